"""Train the sample model of the demo and the tests on the Python standard library's source.

    torchrun --nproc-per-node 2 scripts/train_sample.py --minutes 60 -o src/layershare/sample

`--minutes` spreads the learning-rate schedule over wall time, `--steps` over a number of updates. One process with
several threads works too (`python scripts/train_sample.py …`), but two processes with one thread each wait for each
other once per update instead of in every operation. After a crash the same command continues from the checkpoint in
`--work`, which also holds the model as of the last evaluation; with another `--steps` it changes the schedule from
there on, and the card says so.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from sample_card import card, describe_text
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layershare.calibrate.stdlib import documents

END = "<|endoftext|>"
LENGTH = 512
# A line break is one piece with the indentation after it; words take one space before and their leading underscores.
PIECES = r"\s*[\r\n]+[ \t]*| ?_*\p{L}+| ?\p{N}{1,3}| ?_+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4096 tokens that gives back every text exactly and adds nothing to it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(end: int) -> LlamaForCausalLM:
    """A Llama of 10 layers and 7.6 million parameters with random weights; `end` is the id of `END`."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=10,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    # Scaled so that the first layer does not drown the embeddings, and the later layers with them.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
        model.model.norm.weight.fill_(0.25)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * len(model.model.layers)) ** -0.5)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Token ids of each text with `END` after it."""
    end = tokenizer.get_vocab()[END]
    return [torch.tensor([*ids, end]) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def shuffled_rows(texts: list[Tensor], rows: int, generator: torch.Generator) -> Tensor:
    """All texts in a new order, cut into pieces of LENGTH + 1 tokens, these shuffled into batches of `rows` pieces."""
    order = torch.randperm(len(texts), generator=generator)
    pieces = torch.cat([texts[i] for i in order]).split(LENGTH + 1)[:-1]
    picks = torch.randperm(len(pieces), generator=generator)[: len(pieces) // rows * rows]
    return torch.stack([pieces[i] for i in picks]).view(-1, rows, LENGTH + 1)


def next_token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens rows[:, 1:] given those before them."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, texts: list[Tensor]) -> float:
    """Over blocks of LENGTH tokens without overlap of the joined texts; the last, incomplete block is left out."""
    stream = torch.cat(texts)
    blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    mine = blocks[dist.get_rank() :: dist.get_world_size()]
    total = sum((next_token_loss(model, batch) * len(batch) for batch in mine.split(4)), torch.zeros(()))
    dist.all_reduce(total)
    return math.exp(float(total) / len(blocks))


def average(model: LlamaForCausalLM, *numbers: float) -> list[float]:
    """Replace the gradients by their mean over all processes; returns the mean of each of `numbers` likewise."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(numbers)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([*(g.numel() for g in gradients), len(numbers)])
    for gradient, part in zip(gradients, parts[:-1], strict=True):
        gradient.copy_(part.view_as(gradient))
    return parts[-1].tolist()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model in bfloat16 and its tokenizer as a Hugging Face folder."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = model.generation_config
    stored.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(args: argparse.Namespace) -> None:
    """Tokenizer, model, schedule and evaluations; writes `args.output`."""
    texts = {split: documents(split) for split in ("train", "test")}
    tokenizer = train_tokenizer(texts["train"])
    tokens = {split: encode(tokenizer, texts[split]) for split in texts}
    model = build_model(tokenizer.get_vocab()[END])
    fast_loss = torch.compile(next_token_loss, dynamic=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    schedule = f"--steps {args.steps}" if args.steps else f"--minutes {args.minutes:g}"
    step, seconds, progress, curve, losses, earlier = 0, 0.0, 0.0, [], [], []
    rank, world = dist.get_rank(), dist.get_world_size()
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():  # goes on with a new order of the texts
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        step, seconds, progress, curve = (saved[key] for key in ("step", "seconds", "progress", "curve"))
        earlier = saved["earlier"]
        if saved["schedule"] != schedule:
            earlier = [*earlier, {"schedule": saved["schedule"], "until_step": step}]

    start, rows = time.monotonic() - seconds, []
    while progress < 1:
        rows = rows or list(shuffled_rows(tokens["train"], args.rows, generator))
        with torch.autocast("cpu", torch.bfloat16):
            loss = fast_loss(model, rows.pop()[rank::world])
        loss.backward()
        step += 1
        loss, seconds = average(model, loss.item(), time.monotonic() - start)
        losses.append(loss)
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        for group in optimizer.param_groups:  # warm-up over 100 updates, cosine to a hundredth of the peak
            group["lr"] = args.lr * min(step / 100, 0.505 + 0.495 * math.cos(math.pi * min(progress, 1.0)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if int(progress * args.evaluations) > len(curve):
            with torch.autocast("cpu", torch.bfloat16):
                held_out = perplexity(model, tokens["test"])
            curve.append(
                {
                    "step": step,
                    "tokens": step * args.rows * LENGTH,
                    "seconds": round(seconds),
                    "train_loss": round(sum(losses) / len(losses), 4),
                    "held_out_perplexity": round(held_out, 3),
                }
            )
            losses.clear()
            if rank == 0:
                print(json.dumps(curve[-1]), flush=True)
                save(model, tokenizer, args.work / "model")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
                state |= {"generator": generator.get_state(), "step": step, "seconds": seconds}
                state |= {"progress": progress, "schedule": schedule, "earlier": earlier}
                torch.save(state, args.work / "checkpoint.new")
                os.replace(args.work / "checkpoint.new", checkpoint)

    if rank == 0:
        save(model, tokenizer, args.output)
    dist.barrier()
    stored = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    held_out = perplexity(stored, tokens["test"])
    if rank == 0:
        facts = {
            "held_out_perplexity": round(held_out, 3),
            "parameters": stored.num_parameters(),
            "schedule": schedule,
            "earlier_schedules": earlier,
            "steps": step,
            "tokens_seen": step * args.rows * LENGTH,
            "tokens_per_second": round(step * args.rows * LENGTH / seconds),
            "options": {"rows": args.rows, "lr": args.lr, "seed": args.seed, "processes": world},
            "text": {split: describe_text(texts[split], tokens[split], END) for split in texts},
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
            | {"python": platform.python_version()},
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "curve": curve,
        }
        (args.output / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (args.output / "README.md").write_text(card(facts), encoding="utf-8")
        checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Read the command line; the processes of `torchrun` share the work, one process alone is a team of one."""
    parser = argparse.ArgumentParser(description="Train the sample model on the standard library's source.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="wall time of the schedule")
    length.add_argument("--steps", type=int, help="updates of the schedule")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("build/sample"), help="folder of the checkpoint")
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens per update, all processes")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=15, help="held-out evaluations and checkpoints")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    with TemporaryDirectory() as meeting:
        alone = {"init_method": f"file://{meeting}/point", "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **({} if dist.is_torchelastic_launched() else alone))
        train(args)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
