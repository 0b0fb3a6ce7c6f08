"""lora_finetune.py against transformers' Llama and peft, itself in every form, and as a program: started, misused."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import house
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from house import ROOT, error, finish, losses, overfit, randomised, start, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_finetune as lora
from lora_finetune import Config, Model, Prompts

TINY = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def oracle(folder=None, **how):
    from transformers import LlamaConfig, LlamaForCausalLM

    if folder:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return randomised(LlamaForCausalLM(LlamaConfig(**TINY | how))).eval()


@pytest.fixture
def base(tmp_path):
    """A folder that transformers saved, of random weights."""
    oracle().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_B(model):
    """B = 0, as it is at first, leaves A without a gradient: numbers in its place."""
    for n, p in model.named_parameters():
        if ".lora_B" in n:
            p.data.normal_(std=0.02, generator=torch.Generator().manual_seed(p.numel()))
    return model


def refused(capsys, call):
    """What a mistake prints: one line, exit code 2."""
    capsys.readouterr()  # transformers' bars
    with pytest.raises(SystemExit) as e:
        call()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------- the base
@pytest.mark.parametrize("how", [
    {}, dict(num_key_value_heads=4), dict(rope_parameters=LLAMA3), dict(tie_word_embeddings=True, head_dim=16)])
def test_equals_transformers(tmp_path, how):
    """Logits, loss and every gradient, for a folder that transformers saved, in shards; fp32, relative error."""
    theirs = oracle(**how)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = Model.from_pretrained(tmp_path)
    x, y = tokens(T=40), tokens(T=40).roll(-1, 1)
    assert error(ours(x), theirs(x).logits) < 1e-5
    y[0, :5] = -1
    loss = ours(x, y)
    want = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    assert abs(loss.item() - want.item()) < 1e-5
    loss.backward()
    want.backward()
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert error(p.grad, grads[name]) < 1e-4, name


def test_saves_what_transformers_loads(tmp_path, base):
    """Random weights of ours with every option; and a base that was loaded keeps what its config.json said besides."""
    ours = randomised(Model(Config(method="full", layers=2, heads=4, kv_heads=1, head_dim=6, dim=20, ffn=28, vocab=50,
                                   rope="8,1,4,16", tied=False)))
    ours.save_pretrained(tmp_path / "a")
    assert error(oracle(tmp_path / "a")(tokens()).logits, ours(tokens())) < 1e-5
    ours = Model.from_pretrained(base)
    ours.save_pretrained(tmp_path / "b")
    theirs = oracle(tmp_path / "b")
    assert (error(theirs(tokens()).logits, ours(tokens())) < 1e-5
            and theirs.config.eos_token_id == 2 and ours.stop == {2})


def test_step_equals_forward(base):
    """Prefill of any length, then one token at a time, past the room that the cache begins with."""
    model = Model.from_pretrained(base).eval()
    x = tokens(T=90)
    whole = model(x)
    for cuts in ([70] + [1] * 20, [5, 1, 1, 83]):
        state, at = model.init_state(3), 0
        for n in cuts:
            logits, state = model.step(x[:, at : at + n], state)
            at += n
            assert error(logits, whole[:, at - 1]) < 1e-5
    with pytest.raises(ValueError, match="190 tokens do not fit the 128"):
        model.step(tokens(T=100), state)


def test_greedy_equals_transformers(base):
    x = tokens(B=1, T=4)
    want = oracle(base).generate(x, max_new_tokens=30, do_sample=False)[0, 4:].tolist()
    ours = [i for i, _ in lora.generate(Model.from_pretrained(base), x, Config(temp=0, tokens=30))]
    assert ours == [i for i in want if i != 2], "and it stops where config.json says"


def test_official_sizes():
    """Parameters of Llama 2 7B; and what QLoRA trains of it at rank 64: the paper's script counts 159,907,840."""
    with torch.device("meta"):
        cfg = Config(layers=32, heads=32, kv_heads=32, dim=4096, ffn=11008, vocab=32000, tied=False,
                     method="lora", rank=64)
        model = Model(cfg)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 159_907_840
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 6_738_415_616


# ---------------------------------------------------------------- what is added
def theirs_and_ours(base, tmp_path, config, std=0.3):
    """peft's adapter with random numbers, saved, and read by ours -> both models."""
    from peft import get_peft_model

    theirs = get_peft_model(oracle(base), config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * std)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, Model.from_pretrained(tmp_path / "theirs")


def lora_config(**how):
    from peft import LoraConfig

    return LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | how)


@pytest.mark.parametrize("how", [
    {},
    dict(use_rslora=True, target_modules="all-linear"),
    dict(target_modules=r".*\.(o_proj|down_proj)", lora_dropout=0.5),
    dict(rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 3}, alpha_pattern={"q_proj": 3},
         layers_to_transform=[1]),
])  # fmt: skip
def test_lora_both_ways(base, tmp_path, how):
    """peft's folder gives the same logits and gradients here, and ours there; names are strict on both sides."""
    from peft import PeftModel

    theirs, ours = theirs_and_ours(base, tmp_path, lora_config(**how))
    ours.eval()
    x, y = tokens(), tokens().roll(-1, 1)
    assert error(ours(x), theirs(x).logits) < 1e-5
    ours(x, y).backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).backward()
    grads = {k.removeprefix("base_model.model.").replace(".default.", "."): p.grad
             for k, p in theirs.named_parameters() if p.requires_grad}
    own = {k: p for k, p in ours.named_parameters() if p.requires_grad}
    assert own.keys() == grads.keys() and all(error(p.grad, grads[k]) < 1e-4 for k, p in own.items())
    ours.save_adapter(tmp_path / "ours")
    again = PeftModel.from_pretrained(oracle(base), tmp_path / "ours").eval()
    assert error(again(x).logits, ours(x)) < 1e-5
    assert (load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
            == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys())


def test_prompts_both_ways(base, tmp_path):
    """LLaMA-Adapter as peft has it (AdaptionPrompt): on the last layer of two, with grouped keys."""
    from peft import AdaptionPromptConfig, PeftModel

    theirs, ours = theirs_and_ours(
        base, tmp_path, AdaptionPromptConfig(adapter_len=5, adapter_layers=1, task_type="CAUSAL_LM"), 0.7)
    x = tokens()
    assert error(ours(x), theirs(x).logits) < 1e-5 and error(ours(x), Model.from_pretrained(base)(x)) > 0.01
    ours.save_adapter(tmp_path / "ours")
    assert error(PeftModel.from_pretrained(oracle(base), tmp_path / "ours").eval()(x).logits, ours(x)) < 1e-5


@pytest.mark.parametrize("method", ["lora", "qlora", "adapter"])
def test_begins_as_the_base_and_trains_little(base, method):
    """The base's logits first, bit for bit; only what is added has gradients, moves, is saved; dropout in training."""
    plain = Model.from_pretrained(base)
    if method == "qlora":
        for m in plain.model.modules():
            if isinstance(m, lora.Linear):
                m.weight.data = lora.dequantize_nf4(lora.quantize_nf4(m.weight.data))
    model = Model.from_pretrained(base, method, dropout=0.5, prompts=3, lr=3e-2)
    x, y = tokens(), tokens().roll(-1, 1)
    assert error(model.eval()(x), plain(x)) < 1e-6 if method == "qlora" else torch.equal(model.eval()(x), plain(x))
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    optimizers, first = lora.make_optimizers(model.train(), model.cfg), model(x, y).item()
    for _ in range(20):
        model(x, y).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert model.eval()(x, y).item() < first - 0.1, first
    assert all(torch.equal(p, frozen[k]) for k, p in model.named_parameters() if k in frozen)
    assert torch.equal(model(x), model(x)) and (method == "adapter" or not torch.equal(model.train()(x), model(x)))


def test_qlora_gradients_and_size(base):
    """Every gradient as LoRA's on the decoded weights. 0.52 bytes a weight are held, nothing decoded between passes."""
    a, b = Model.from_pretrained(base, "qlora"), Model.from_pretrained(base, "lora")
    for (n, p), m in zip(a.model.named_modules(), b.model.modules()):
        if isinstance(p, lora.Linear):
            assert p.weight is None
            assert sum(t.nbytes for t in p.nf4.values() if torch.is_tensor(t)) < 0.55 * m.weight.numel() + 8
            m.weight.data = lora.dequantize_nf4(p.nf4)
    for p, q in zip([p for p in a.parameters() if p.requires_grad], [p for p in b.parameters() if p.requires_grad]):
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
        q.data.copy_(p.data)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        loss = a(tokens(), tokens().roll(-1, 1))
    assert not any(t.is_floating_point() and t.shape in ((32, 32), (48, 32), (32, 48)) for t in held)
    loss.backward()
    b(tokens(), tokens().roll(-1, 1)).backward()
    grads = {n: p.grad for n, p in b.named_parameters()}
    assert all(error(p.grad, grads[n]) < 1e-4 for n, p in a.named_parameters() if p.requires_grad)


def test_the_frozen_head_has_no_gradient():
    """Neither dW of the head nor logits of all rows exist in a step: 300 x 5,000 of fp32 would be 6 MB, dW 0.6 MB."""
    from kernels import cross_entropy

    made = []
    original = cross_entropy.chunked_loss
    cross_entropy.chunked_loss = lambda *a: made.append(original(*a)) or made[-1]
    try:
        model = Model(Config(layers=1, heads=2, kv_heads=1, dim=32, ffn=32, vocab=5000))
        x = torch.randint(5000, (1, 300))
        model(x, x).backward()
    finally:
        cross_entropy.chunked_loss = original
    assert [d is None for d in made[0][1:]] == [False, True]


def test_checkpointing_changes_nothing(base):
    x, y = tokens(), tokens().roll(-1, 1)
    found = []
    for ckpt in (False, True):
        torch.manual_seed(0)
        model = Model.from_pretrained(base, "lora", dropout=0.2, ckpt=ckpt)
        torch.manual_seed(1)
        loss = model(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_bf16_base_under_autocast(base):
    """A frozen base in bf16 with adapters in fp32, as on a GPU: the loss and the gradients are near those of fp32."""
    x, y = tokens(), tokens().roll(-1, 1)
    found = []
    for dtype, cast in (("fp32", False), ("bf16", True)):
        torch.manual_seed(0)
        model = with_B(Model.from_pretrained(base, "lora", dtype=dtype))
        assert ({p.dtype for p in model.parameters() if not p.requires_grad}
                == {torch.bfloat16 if cast else torch.float32})
        with torch.autocast("cpu", torch.bfloat16, cast):
            loss = model(x, y)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (a, da), (b, db) = found
    assert abs(a.item() - b.item()) < 0.05 * a.item()
    assert all(db[n].dtype == torch.float32 and error(db[n], g) < 0.2 for n, g in da.items())


RECORDED = dict(
    full=[4.1783, 4.1336, 4.0575, 3.9724, 3.8935, 3.8101, 3.7226, 3.6328, 3.5416, 3.4497],
    lora=[4.1783, 4.1750, 4.1675, 4.1553, 4.1407, 4.1268, 4.1135, 4.1024, 4.0960, 4.0793],
)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recorded_losses(method):
    """Ten steps on one batch, as recorded: a change of the maths, the initialisation or the schedule shows here."""
    found = overfit(lora, heads=2, kv_heads=1, ffn=24, method=method)
    assert all(abs(a - b) < 2e-4 for a, b in zip(found, RECORDED[method], strict=True)), found


def test_alone_gives_the_same_losses(base):
    """The file's definitions and the operations in kernels/ are the same maths; fallback scales of NF4 round once."""
    alone = house.alone("lora_finetune.py")
    x, y = tokens(), tokens().roll(-1, 1)
    for method, limit in (("lora", 1e-5), ("qlora", 2e-2)):
        torch.manual_seed(0)
        a = with_B(Model.from_pretrained(base, method))
        torch.manual_seed(0)
        b = with_B(alone.Model.from_pretrained(base, method))
        for m in (a, b):
            m(x, y).backward()
        assert abs(a(x, y).item() - b(x, y).item()) < limit
        assert all(error(q.grad, p.grad) < limit for p, q in zip(a.parameters(), b.parameters()) if p.requires_grad)


# ---------------------------------------------------------------- conversations
CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
          "{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}"
              "{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set ms = messages[1:] %}"
              "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
              "{% for m in ms %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
              "{{ bos_token + '[INST] ' + (s if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
              "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{{- bos_token }}"
              "{%- if tools is not none %}{{- raise_exception('no') }}{%- endif %}{% for message in messages %}"
              "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
              " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}  # fmt: skip
TALK = [dict(role="system", content="Be brief."), dict(role="user", content="2 + 2?"),
        dict(role="assistant", content="4"), dict(role="user", content="And 3 + 3?"),
        dict(role="assistant", content="It is 6.")]  # fmt: skip


@pytest.fixture
def hf(tmp_path):
    """A small tokenizer folder, as a base has it: bytes as a vocabulary, a bos that its post-processor puts first."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])

    def make(template="", folder=tmp_path / "tok"):
        folder.mkdir(exist_ok=True)
        t.save(str(folder / "tokenizer.json"))
        config = (dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")
                  | (dict(chat_template=template) if template else {}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(hf, name):
    """Turn by turn: the text is what transformers renders; the assistant's words with their end alone are answers."""
    from transformers import AutoTokenizer

    folder = hf(TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    prompts = Prompts(lora.Tokenizer(str(folder / "tokenizer.json")), "")
    for talk in (TALK, TALK[1:3]):
        ids, answer = prompts.encode(talk)
        assert ids.tolist() == theirs.apply_chat_template(talk, return_dict=False)
        said = theirs.decode(ids[answer])
        for t in talk:
            assert (t["content"] in said) == (t["role"] == "assistant")
        question, none = prompts.encode(talk[:-1])
        assert question.tolist() == theirs.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)
        assert none[-1] == 0 and ids[: len(question)].tolist() == question.tolist(), (
            "training sees the question as a user puts it")


def test_alpaca_prompts(hf):
    """The text of Stanford's prompts, by its hash; bos first; the answer and its end token alone are in the loss."""
    prompts = Prompts(lora.Tokenizer(str(hf() / "tokenizer.json")), "")
    assert prompts.how == "alpaca"
    for given, digest in (("{input}", "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f"),
                          ("", "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca")):
        turns = lora.conversation(dict(instruction="{instruction}", input=given, output="Yes."), "row")
        (text, *_), _ = prompts.pieces(turns)
        assert hashlib.sha256(text.encode()).hexdigest() == digest
        ids, answer = prompts.encode(turns)
        assert (ids[0] == 256 and prompts.tok.decode(ids[answer][:-1].tolist()) == "Yes."
                and ids[answer][-1] == 257 and answer.sum() == 5)


@pytest.mark.parametrize("row, want", [
    (dict(instruction="a", output="b"), [("user", "a"), ("assistant", "b")]),
    (dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b"),
                    dict(role="user", content="c")]), [("user", "a"), ("assistant", "b")]),
    (dict(conversations=[{"from": "gpt", "value": "x"}, {"from": "human", "value": "a"},
                         {"from": "gpt", "value": "b"}]), [("user", "a"), ("assistant", "b")]),
    (dict(text="t"), [("assistant", "t")]),
])  # fmt: skip
def test_rows(row, want):
    assert [(t["role"], t["content"]) for t in lora.conversation(row, "row")] == want


def examples(pairs, seq=32):
    """[(question, answer), ...] as arrays of ids -> Examples."""
    encoded = [(np.array(q + a, np.int32), np.array([False] * len(q) + [True] * len(a))) for q, a in pairs]
    return lora.Examples(encoded, Config(seq=seq, data="x"), "train")


def test_packing(base):
    """Examples that share a row see nothing of each other: the loss is each one's alone, weighted by its answers."""
    pairs = [([3, 4, 5], [6, 7]), ([8, 9], [10, 11, 12, 13]), ([14] * 5, [15, 16])]
    rows = examples(pairs)
    assert len(rows.x) == 1 and rows.tokens == 8 and sorted(set(rows.x[0, 1])) == [-1, 0, 1, 2]
    x, y = rows.windows(np.array([0]))
    assert x.shape == (1, 2, 32) and (y >= 0).sum() == 8
    for method in ("lora", "adapter"):
        model = randomised(Model.from_pretrained(base, method), 0.2)
        packed = model(x, y)
        total = 0.0
        for q, a in pairs:
            ids = torch.tensor([q + a])
            t = ids[:, 1:].clone()
            t[:, : len(q) - 1] = -1
            total = total + model(ids[:, :-1], t) * len(a)
        assert abs(packed.item() - total.item() / 8) < 1e-5
        own = [p for p in model.parameters() if p.requires_grad]
        for g, h in zip(torch.autograd.grad(packed, own), torch.autograd.grad(total / 8, own)):
            assert error(g, h) < 1e-4 or h.norm() == 0


def test_rows_of_one_example(base, capsys):
    """No shared row, no mask; what fills a row up is not in the loss; one whose question is too long is left out."""
    rows = examples([([3] * 20, [6] * 9), ([8] * 25, [10, 11]), ([1] * 40, [5])])
    assert "1 of 3 examples" in capsys.readouterr().out and len(rows.x) == 2
    x, y = rows.windows(np.array([0, 1]))
    assert x.shape == (2, 32) and sorted((y >= 0).sum(1).tolist()) == [2, 9]
    seen = torch.cat([rows.batch(Config(seq=32, batch=1), i, 0, 0, 1)[1] for i in range(2)])
    assert sorted((seen >= 0).sum(1).tolist()) == [2, 9], "an epoch has every row once"


# ---------------------------------------------------------------- as a program
ROWS = [dict(instruction=f"What is {a} plus {b}?", input="", output=f"It is {a + b}.")
        for a in range(12) for b in range(8)]
RUN = ["--seq", "96", "--batch", "2", "--eval-iters", "2", "--tokens", "20", "--dtype", "fp32", "--warmup", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of bytes as the file itself saves one, and instructions."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    Model(Config(method="full", layers=2, heads=2, kv_heads=1, dim=32, ffn=64, vocab=256,
                 positions=128)).save_pretrained(folder / "base")
    (folder / "base" / "tok.json").write_text(json.dumps(dict(tok="byte", chars="")))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """The program in this process, on one thread: what it prints. stop: the save after which it dies."""
    threads, save = torch.get_num_threads(), lora.save
    torch.set_num_threads(1)

    def call(*args, stop=None):
        def dying(cfg, model, optimizers, tok, step, best):
            save(cfg, model, optimizers, tok, step, best)
            if step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(lora, "save", dying)
        lora.main([str(a) for a in args])
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


def test_trains_resumes_answers_and_merges(tmp_path, made, run):
    """A run that died and resumed equals the other to the bit; only the adapter is saved; merged it answers alike."""
    args = ["--init", made / "base", "--data", made / "rows.json", *RUN, "--lr", "3e-2", "--dropout", "0.1",
            "--steps", "30", "--eval-every", "10", "--log-every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert "frozen; 8,192 are trained (lora, rank 8)" in run(*args, "--out", one)
    with pytest.raises(KeyboardInterrupt):
        run(*args, "--out", two, stop=20)
    run("--resume", "--out", two, "--log-every", "1")
    a, b = losses(one), losses(two)
    assert float(a[30][1]) < float(a[1][0]) - 0.2
    assert {s: a[s] for s in range(21, 31)} == {s: b[s] for s in range(21, 31)}
    assert {f.name for f in one.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "tok.json", "train_state.pt", "log.csv"}
    assert (one / "adapter_model.safetensors").stat().st_size < 60_000
    assert all(torch.equal(v, load_file(two / "adapter_model.safetensors")[k])
               for k, v in load_file(one / "adapter_model.safetensors").items())
    said = run("--sample", "What is 3 plus 4?", "--out", one, "--tokens", "12")
    assert said.startswith("What is 3 plus 4?\n")
    run("--merge", tmp_path / "merged", "--out", one)
    assert run("--sample", "What is 3 plus 4?", "--init", tmp_path / "merged", "--tokens", "12") == said
    x = tokens(V=256)
    merged, adapted = Model.from_pretrained(tmp_path / "merged"), Model.from_pretrained(one)
    assert error(merged(x), adapted.eval()(x)) < 1e-5 and error(oracle(tmp_path / "merged")(x).logits, merged(x)) < 1e-5


def test_merge_keeps_the_dtype_and_the_tokenizer(tmp_path, base, hf):
    """A bf16 base stays bf16, what no adapter touches stays as it was, and the folder is whole for transformers."""
    model = oracle(base).bfloat16()
    model.save_pretrained(base)
    hf(CHATML, base)
    adapter = Model.from_pretrained(base, "lora", targets="q_proj,up_proj")
    randomised(torch.nn.ParameterList(p for p in adapter.parameters() if p.requires_grad))
    adapter.save_adapter(tmp_path / "adapter")
    lora.main(["--init", str(tmp_path / "adapter"), "--merge", str(tmp_path / "m")])
    a, b = load_file(base / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert a.keys() == b.keys() and all(v.dtype == torch.bfloat16 for v in b.values())
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert changed == {k for k in a if "q_proj" in k or "up_proj" in k}
    assert ({"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
            <= {f.name for f in (tmp_path / "m").iterdir()})
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    x = tokens()
    assert error(oracle(tmp_path / "m")(x).logits, adapter(x)) < 1e-2  # bf16 weights on one side


def test_a_folder_that_held_another_kind_of_run(tmp_path, made, run):
    """The whole model where an adapter was, and an adapter where a whole model was; and after a kill in between."""
    args = ["--init", made / "base", "--data", made / "rows.json", *RUN, "--steps", "1"]
    out, old, kept = tmp_path / "o", tmp_path / "old", {"adapter_config.json", "adapter_model.safetensors"}
    run(*args, "--out", out)
    shutil.copytree(out, old)
    run(*args, "--method", "full", "--out", out)
    assert not kept & {f.name for f in out.iterdir()} and not hasattr(Model.from_pretrained(out), "adapter")
    said = run("--sample", "What is 3 plus 4?", "--out", out)
    assert "final val loss" in run("--resume", "--steps", "2", "--out", out)
    run("--merge", tmp_path / "m", "--out", out)
    assert (tmp_path / "m" / "model.safetensors").is_file()
    # killed before the run was decided, and after it: adapter and model lie in the folder
    for f in ("config.json", "model.safetensors"):
        shutil.copy(out / f, old)
    assert hasattr(Model.from_pretrained(old), "adapter")
    for f in kept:
        shutil.copy(old / f, out)
    assert run("--sample", "What is 3 plus 4?", "--out", out) and said and not kept & {f.name for f in out.iterdir()}
    shutil.copy(old / "adapter_config.json", out)  # an adapter's first save, cut short
    assert not hasattr(Model.from_pretrained(out), "adapter")
    run(*args, "--out", out)
    assert hasattr(Model.from_pretrained(out), "adapter") and run("--sample", "What is 3 plus 4?", "--out", out)
    assert "final val loss" in run("--resume", "--steps", "2", "--out", out)
    Model.from_pretrained(made / "base").save_pretrained(out)
    assert not kept & {f.name for f in out.iterdir()}


def test_rows_of_text(tmp_path, made, run):
    """Texts without questions train, and the sample begins with the first token of one."""
    rows = [json.dumps(dict(text=f"{i} and {i} is {2 * i}.")) for i in range(9)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    out = run("--init", made / "base", "--data", tmp_path / "x.jsonl", *RUN, "--steps", "1", "--out", tmp_path / "o")
    assert "final val loss" in out and "\n8" in out


def test_merge_copies_the_tokenizer_s_files_only(tmp_path, made, run, monkeypatch):
    """What lies in the current directory is no part of a base of bytes."""
    monkeypatch.chdir(tmp_path)
    Path("generation_config.json").write_text('{"eos_token_id": 7}')
    Path("tok.json").write_text("{}")
    Model.from_pretrained(made / "base", "lora").save_adapter("a")
    run("--init", "a", "--merge", "m")
    assert {f.name for f in Path("m").iterdir()} == {"model.safetensors", "config.json", "tok.json"}
    assert Path("m/tok.json").read_text() == (made / "base" / "tok.json").read_text()


def test_two_processes_equal_one(tmp_path, made, run):
    """Same global batch, of rows with different numbers of answers: losses over 6 steps within 1e-5."""
    rows = [dict(instruction="Count.", output="1, 2, 3, 4, 5, 6, 7, 8"[: 1 + 3 * (i % 8)]) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["--init", made / "base", "--data", tmp_path / "rows.jsonl", *RUN, "--seq", "40", "--lr", "1e-2",
            "--steps", "6", "--eval-every", "6", "--log-every", "1"]
    run(*args, "--out", tmp_path / "one")
    finish(start([str(a) for a in [*args, "--out", tmp_path / "two"]], "lora_finetune.py", torchrun=2))
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys() and all(abs(float(a[s][0]) - float(b[s][0])) < 1e-5 for s in a)


def test_alone(tmp_path, made):
    """Copied into an empty folder: QLoRA trains there too, in plain PyTorch."""
    shutil.copy(ROOT / "lora_finetune.py", tmp_path)
    args = ["--init", made / "base", "--data", made / "rows.json", *RUN, "--method", "qlora", "--steps", "3",
            "--out", "o"]
    out = finish(start([str(a) for a in args], "lora_finetune.py", cwd=tmp_path))
    assert "plain PyTorch" in out and "final val loss" in out


def test_without_a_base(tmp_path, run, monkeypatch):
    """No --init: a tiny base, here smaller still, is trained, then adapted; it says so and how to name a real one."""
    small = dict(steps=2, layers=1, dim=32, ffn=32, heads=2, batch=1, eval_iters=1)
    monkeypatch.setitem(lora.PRESETS, "base", lora.PRESETS["base"] | small)
    args = ["--preset", "cpu", "--seq", "64", "--batch", "1", "--steps", "2", "--eval-iters", "1", "--tokens", "5",
            "--out", tmp_path / "o"]
    out = run(*args)
    assert ("training a tiny base first" in out and "would name a real one" in out
            and "now --method lora adapts it" in out and "final val loss" in out)
    assert "training a tiny base" not in run(*args), "the second time it is there"


# ---------------------------------------------------------------- mistakes
def test_bases_that_are_refused(base, capsys):
    good, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    cases = [
        (good, config | dict(model_type="qwen2"), "model_type is 'qwen2'; this file knows llama and mistral"),
        (good, config | dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (good, config | dict(rope_parameters=dict(rope_type="yarn")), "rope_type 'yarn'"),
        (good, {k: v for k, v in config.items() if k != "intermediate_size"}, "no 'intermediate_size'"),
        ({k: v for k, v in good.items() if k != "model.norm.weight"}, config, "no tensor model.norm.weight"),
        (good | {"model.extra": torch.ones(1)}, config, "unknown tensor model.extra"),
        (good | {"model.norm.weight": torch.ones(31)}, config, "model.norm.weight is (31,), but (32,)"),
    ]
    for tensors, c, said in cases:
        save_file(tensors, base / "model.safetensors")
        (base / "config.json").write_text(json.dumps(c))
        assert said in refused(capsys, lambda: Model.from_pretrained(base))
    (base / "config.json").write_text("{")
    assert "damaged" in refused(capsys, lambda: Model.from_pretrained(base))
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:500])
    assert "damaged" in refused(capsys, lambda: Model.from_pretrained(base))
    assert "no such file" in refused(capsys, lambda: Model.from_pretrained(base / "none"))


@pytest.mark.parametrize("file, text, said", [
    ("config.json", "[]", "config.json: damaged (a list, where an object was expected)"),
    ("config.json", dict(hidden_size=0), "hidden_size is 0 in config.json; a whole number above 0"),
    ("config.json", dict(num_hidden_layers="2"), "num_hidden_layers is '2' in config.json"),
    ("config.json", dict(rms_norm_eps=[1]), "rms_norm_eps is [1] in config.json"),
    ("config.json", dict(rope_parameters=[1]), "is [1] in config.json; an object was expected"),
    ("config.json", dict(vocab_size=None), "config.json has no 'vocab_size'"),
    ("config.json", dict(eos_token_id="</s>"), "eos_token_id is ['</s>']"),
    ("model.safetensors.index.json", "{}", "model.safetensors.index.json: damaged"),
])  # fmt: skip
def test_damaged_files_of_a_base(base, capsys, file, text, said):
    text = text if isinstance(text, str) else json.dumps(json.loads((base / file).read_text()) | text)
    (base / file).write_text(text)
    assert said in refused(capsys, lambda: Model.from_pretrained(base))


@pytest.mark.parametrize("method, change, said", [
    ("lora", [], "adapter_config.json: damaged (a list"),
    ("lora", dict(lora_alpha=None), "lora_alpha is None in adapter_config.json; a number above 0"),
    ("lora", dict(lora_alpha="16"), "lora_alpha is '16' in adapter_config.json"),
    ("lora", dict(alpha_pattern=[1]), "alpha_pattern is [1] in adapter_config.json"),
    ("lora", dict(lora_dropout=2), "lora_dropout is 2 in adapter_config.json"),
    ("lora", dict(base_model_name_or_path=5), "does not name its base"),
    ("adapter", dict(adapter_len=0), "adapter_len is 0 in adapter_config.json; a whole number above 0"),
    ("adapter", dict(adapter_layers=1.5), "adapter_layers is 1.5 in adapter_config.json"),
])  # fmt: skip
def test_damaged_files_of_an_adapter(base, tmp_path, capsys, method, change, said):
    Model.from_pretrained(base, method).save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change if change else change))
    assert said in refused(capsys, lambda: Model.from_pretrained(tmp_path / "a"))


def test_an_adapter_of_rank_0(base, tmp_path, capsys):
    Model.from_pretrained(base, "lora").save_adapter(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v[:0] if "lora_A" in k else v[:, :0].contiguous() for k, v in load_file(file).items()}, file)
    assert "lora_A.weight is (0, " in refused(capsys, lambda: Model.from_pretrained(tmp_path / "a"))


def test_a_missing_shard(tmp_path, capsys):
    oracle().save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert f"{gone.name}: not found; the index names it: a shard is missing" in refused(
        capsys, lambda: Model.from_pretrained(tmp_path))


def test_adapters_that_are_refused(base, tmp_path, capsys):
    """Another base's adapter, by shape and by name; a tensor too few; DoRA; no base named; damaged."""
    Model.from_pretrained(base, "lora").save_adapter(tmp_path / "a")
    file, config = (tmp_path / "a" / "adapter_model.safetensors",
                    json.loads((tmp_path / "a" / "adapter_config.json").read_text()))
    good = load_file(file)
    first = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    cases = [
        (good | {first: torch.ones(8, 31)}, config,
         "up_proj.lora_A.weight is (8, 31), but the base asks for (8, 32): an adapter of another base"),
        ({k.replace("layers.1.", "layers.7."): v for k, v in good.items()}, config, "unknown tensor model.layers.7."),
        ({k: v for k, v in good.items() if k != first.replace("_A", "_B")}, config,
         "no tensor model.layers.0.mlp.up_proj.lora_B.weight"),
        (good, config | dict(use_dora=True), "use_dora"),
        (good, config | dict(peft_type="IA3"), "IA3"),
        (good, config | dict(base_model_name_or_path=None), "does not name its base"),
    ]
    for tensors, c, said in cases:
        save_file(tensors, file)
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(c))
        assert said in refused(capsys, lambda: Model.from_pretrained(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    file.write_bytes(b"x" * 50)
    assert "damaged" in refused(capsys, lambda: Model.from_pretrained(tmp_path / "a"))


def test_rows_end_with_a_newline_only(tmp_path):
    """A mark at the file's beginning, and characters inside strings at which splitlines() would cut."""
    row = dict(instruction="a\u2028b\u0085c\x0c", output="d")
    (tmp_path / "x.jsonl").write_text("\ufeff" + (json.dumps(row, ensure_ascii=False) + "\r\n") * 2, newline="")
    (tmp_path / "y.json").write_text("\ufeff" + json.dumps([row, row]))
    for f, where in (("x.jsonl", "line"), ("y.json", "item")):
        assert [r for _, r in lora.read_rows(tmp_path / f)] == [row, row], where


@pytest.mark.parametrize("text, said", [
    ('{"instruction": "a", "output": "b"}\n\n{"instruction": "c"}\n',
     'line 3: a row has instruction and output, or messages'),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\n', "line 2: there is no answer"),
    ('{"instruction": "a", "output": "b"}\n{}\n', "line 2: a row has"),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output"\n', "line 2: no JSON"),
    ('{"instruction": "a", "output": 3}\n', "line 1: a text in it is no string"),
    ('"text"\n', "line 1: a str, where an object was expected"),
    ('{"output": "b"}\n', "line 1: 'instruction' is missing"),
    ('{"messages": [{"role": "bard", "content": "x"}]}\n', "line 1: 'bard' is missing, or unknown as a role"),
    ('{"messages": []}\n', "line 1: there is no answer"),
    ('[{"instruction": "a", "output": "b"}, 5]', "item 1: a int"),
    ("", "0 rows, at least 2"),
])  # fmt: skip
def test_rows_that_are_refused(tmp_path, capsys, text, said):
    (tmp_path / "x.jsonl").write_text(text)
    cfg = Config(data=str(tmp_path / "x.jsonl"), seq=64)
    assert said in refused(capsys, lambda: lora.load_data(cfg, {}, lora.Tokenizer("byte")))


@pytest.mark.parametrize("flags, said", [
    (["--method", "dora"], "--method dora: one of lora"),
    (["--targets", "q_proj,query"], "--targets query: one or more of down_proj"),
    (["--rank", "0"], "--rank 0"),
    (["--optim", "muon"], "--optim muon"),
    (["--seq", "500"], "--seq 500: the base was made for 128 tokens"),
    (["--prompt", "chat"], "--prompt chat: the tokenizer byte has no chat template"),
    (["--prompt", "poem"], "--prompt poem: one of chat, alpaca, plain"),
    (["--data", "none.json"], "--data none.json: No such file"),
    (["--init", "nothing"], "nothing: no such file"),
    (["--seq", "12"], "--seq 12: no answer of the train split"),
])  # fmt: skip
def test_flags_that_are_refused(made, tmp_path, capsys, flags, said):
    args = ["--init", str(made / "base"), "--data", str(made / "rows.json"), *RUN, "--out", str(tmp_path / "o"), *flags]
    assert said in refused(capsys, lambda: lora.main(args)).replace("out: ", "")


@pytest.mark.parametrize("flags, said", [
    (["--rank", "4"], "--rank 4: {a} is an adapter, made with 8; without that flag it is used as it is"),
    (["--alpha", "8"], "--alpha 8.0: {a} is an adapter, made with 16.0"),
    (["--rslora"], "--rslora True: {a} is an adapter, made with False"),
    (["--targets", "q_proj"], "--targets q_proj: {a} is an adapter, made with q_proj,v_proj"),
    (["--method", "adapter"], "--method adapter: {a} is an adapter, made with --method lora"),
    (["--method", "full"], "--method full: {a} is an adapter"),
    (["--rank", "8", "--alpha", "16", "--no-rslora", "--targets", "v_proj,q_proj", "--method", "lora"], None),
    ([], None),
])  # fmt: skip
def test_flags_that_an_adapter_has_already(made, tmp_path, capsys, run, flags, said):
    """One that differs would change nothing and is refused, with --init, --resume, --sample; an equal one is not."""
    a, o = str(tmp_path / "a"), str(tmp_path / "o")
    Model.from_pretrained(made / "base", "lora", targets="q_proj,v_proj").save_adapter(a)
    args = ["--init", a, "--data", str(made / "rows.json"), *RUN, "--steps", "1", "--out", o]
    run(*args)  # its config has this file's rank and targets, the adapter its own
    for call, where in ((args, a), (["--resume", "--steps", "2", "--out", o], o), (["--sample", "x", "--out", o], o)):
        if said:
            assert said.format(a=where) in refused(capsys, lambda c=call: lora.main([*c, *flags]))
        else:
            run(*call, *flags)


def test_merging_where_it_would_destroy(made, tmp_path, capsys):
    """Into the base's own folder, an adapter's, or none: refused before anything is written."""
    base, a = shutil.copytree(made / "base", tmp_path / "base"), tmp_path / "a"
    Model.from_pretrained(base, "lora").save_adapter(a)
    before = {f: f.read_bytes() for d in (base, a) for f in d.iterdir()}
    for folder, said in ((base, "the base itself is there"), (a, "it holds an adapter"), ("", "--merge: its value is")):
        assert said in refused(capsys, lambda f=folder: lora.main(["--init", str(a), "--merge", str(f)]))
    assert before == {f: f.read_bytes() for d in (base, a) for f in d.iterdir()}


def test_merging_prompts_is_refused(base, tmp_path, capsys):
    Model.from_pretrained(base, "adapter").save_adapter(tmp_path / "a")
    assert "no part of any weight" in refused(
        capsys, lambda: lora.main(["--init", str(tmp_path / "a"), "--merge", str(tmp_path / "m")]))
    assert "is an adapter" in refused(capsys, lambda: lora.main(["--init", str(tmp_path / "a"), "--method", "full"]))


def test_reads_tensor_by_tensor(base, monkeypatch):
    """QLoRA: never two matrices of the base unquantised at once."""
    class Seen(Exception):
        pass

    whole = []
    original = lora.Linear.quantize

    def quantize(self):
        whole.append(self.weight.numel())
        original(self)
        assert self.weight is None

    monkeypatch.setattr(lora.Linear, "quantize", quantize)
    with safe_open(base / "model.safetensors", "pt") as f:
        n = sum("proj" in k for k in f.keys())
    model = Model.from_pretrained(base, "qlora")
    assert len(whole) == n == 14 and not any(p.shape == (48, 32) for p in model.parameters())
    assert dataclasses.asdict(model.cfg)["method"] == "qlora" and Path(model.base) == base
