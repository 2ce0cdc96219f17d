"""Exported folders with their cards, read as the hub's library and transformers read them."""

import json
import re
import shutil

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, metadata_load

import rpo_jax
from rpo_jax import export, models
from rpo_jax.config.reading import load_config
from rpo_jax.runs.model_card import model_card
from tests.runs import configured, metric_lines, preference_rows, write_rows

BASE_CARD = """---
license: other
license_name: tea-license
license_link: LICENSE.md
base_model: tea-lab/tea-7b
---
# Tea
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An SFT run from scratch, its export as the base of an RPO run and of a LoRA run; all exports."""
    folder = tmp_path_factory.mktemp("a secret place")
    data = write_rows(folder / "tea preferences.jsonl")

    def run(name, **changes):
        settings = {"train.steps": 2, "tracking.tensorboard": False, "data.eval_rows": 8}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return rpo_jax.run(configured(data, folder / name, folder / "cache", settings)).run_dir

    sft = run("sft", objective__name="sft")
    base = export.export(sft, folder / "tea-base")
    made = {"sft": shutil.copytree(base, folder / "sft-hf")}
    (base / "README.md").write_text(BASE_CARD, encoding="utf-8")
    common = {"objective__name": "rpo", "contrast__weights": "uniform", "model__path": base}
    made["rpo"] = export.export(run("rpo", **common), folder / "rpo-hf")
    lora = run("lora", lora__rank=4, reference__mode="adapter", **common)
    made["merged"] = export.export(lora, folder / "merged-hf")
    made["adapter"] = export.export(lora, folder / "adapter-hf", adapter=True)
    return folder, made


# peft asks transformers for a property by its old name.
PEFT_IS_BEHIND = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
KINDS = ("sft", "rpo", "merged", "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_loads_and_its_metadata_is_valid(kind, world):
    _, made = world
    card = ModelCard.load(made[kind] / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == ("peft" if kind == "adapter" else "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["rpo_jax", "sft" if kind == "sft" else "rpo"] + ["lora"] * (kind in ("merged", "adapter"))
    assert card.data.to_dict() == metadata_load(made[kind] / "README.md")  # nothing is lost on the way
    if kind == "sft":
        assert card.data.license is None
    else:
        assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "tea-license", None)
    # Of whole weights the card tells what their base came from; adapters fit the base alone, which is not on the hub.
    assert card.data.base_model == ("tea-lab/tea-7b" if kind in ("rpo", "merged") else None)
    assert card.data.datasets is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_what_was_done(kind, world):
    folder, made = world
    text = ModelCard.load(made[kind] / "README.md").text
    assert ("Supervised" in text or "sft" in text) if kind == "sft" else "**Relative Preference Optimization**" in text
    assert "arXiv:2402.10958" in text
    assert "`tea preferences.jsonl`" in text
    assert ("a new llama model" in text.lower()) == (kind == "sft")
    assert ("tea-base" in text) == (kind != "sft")
    assert ("| lora.rank | 4 |" in text) == (kind in ("merged", "adapter"))
    assert "| optim.learning_rate | 0.001 |" in text
    assert "| steps | 2 |" in text
    lines = metric_lines(folder / ("lora" if kind in ("merged", "adapter") else kind))
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [0, 2]
    assert f"| loss | {held_out[0]['eval_loss']:.4f} | {held_out[1]['eval_loss']:.4f} |" in text
    # Before training, a policy that is its own reference tells nothing apart.
    accuracies = f"{held_out[1].get('eval_rewards/accuracies', 0):.4f}"
    assert (f"| rewards/accuracies | tied | {accuracies} |" in text) == (kind != "sft")
    assert "-0.0000" not in text
    assert "| data.template | auto |" in text
    assert "| batch.order | shuffled |" in text
    assert f"| epochs | {2 / 3:.3g} |" in text  # 24 pairs in batches of 8
    assert "On the last 8 usable rows of `tea preferences.jsonl`." in text


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_machine_is_in_the_card(kind, world):
    _, made = world
    text = (made[kind] / "README.md").read_text(encoding="utf-8")
    assert "a secret place" not in text
    assert not re.search(r"(?<![\w:/\]\[(`.\"-])/(?:home|root|tmp|Users|work|var)/", text)
    assert "cache" not in text.replace("reference.mode | cached", "")
    assert "eval_seconds" not in text
    assert "tracking" not in text


@pytest.mark.parametrize("kind", KINDS)
@PEFT_IS_BEHIND
def test_the_folder_generates_in_a_pipeline(kind, world):
    _, made = world
    generate = transformers.pipeline("text-generation", str(made[kind]), device="cpu")
    prompt = "How do I make tea?"
    said = generate(prompt, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert said.startswith(prompt)
    # The pipeline loaded these weights, not random ones: adapters and merged weights say the same.
    tokens = generate.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        logits = generate.model(**tokens).logits
        if kind in ("merged", "adapter"):
            other = transformers.AutoModelForCausalLM.from_pretrained(
                made["merged" if kind == "adapter" else "adapter"]
            )
            torch.testing.assert_close(logits, other(**tokens).logits, atol=1e-4, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(made[kind]).decode(
        tokens["input_ids"][0], skip_special_tokens=True
    )


@PEFT_IS_BEHIND
def test_the_adapters_snippet_runs(world):
    """The card's own code, with the folder's name put in."""
    folder, made = world
    text = (made["adapter"] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace("path/to/this/folder", str(made["adapter"])).replace('"tea-base"', f'"{folder / "tea-base"}"')
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=2"), "card", "exec"), {})


def test_a_card_of_an_earlier_step_has_its_metrics_and_one_without_metrics_has_none(world, tmp_path):
    folder, _ = world
    run_dir = shutil.copytree(folder / "rpo", tmp_path / "rpo")
    config, architecture = load_config(run_dir / "config.yaml"), models.read_config(run_dir / "model")

    def card(step):
        return model_card(config, architecture, run_dir=run_dir, step=step, base=config.model.path, adapter=False)

    assert "| metric | step 0 | step 2 |" in card(2)
    assert "| metric | step 0 |\n" in card(1)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert "| epochs | 1.33 |" in card(4)
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 2, "eval_rewards/margins": -1e-9}) + "\n")
    assert "| rewards/margins | 0.0000 | 0.0000 |" in card(2)
    broken = {"step": 2, "eval_loss": float("nan"), "eval_rewards/margins": 0.25}
    (run_dir / "metrics.jsonl").write_text(json.dumps(broken) + "\n" + lines[:20], encoding="utf-8")  # and cut short
    assert "| rewards/margins | 0.2500 |" in card(2)
    assert "nan" not in card(2).lower()
    (run_dir / "metrics.jsonl").unlink()
    assert "Held-out" not in card(2)


def test_a_card_shows_messages_where_prompts_were_rendered(world, tmp_path):
    """The whole way: rows of conversations, a run, its export, and the card's code run on the folder."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in preference_rows()
    ]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    settings = {"train.steps": 1, "tracking.tensorboard": False, "objective.name": "sft"}
    run_dir = rpo_jax.run(configured(data, tmp_path / "run", tmp_path / "cache", settings)).run_dir
    saved = export.export(run_dir, tmp_path / "hf")
    text = (saved / "README.md").read_text(encoding="utf-8")
    assert 'messages = [{"role": "user", "content": "..."}]' in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("path/to/this/folder", str(saved))
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=2"), "card", "exec"), {})
    _, made = world
    assert "messages" not in (made["sft"] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", "# no metadata", "---\n: [\n---\n", "---\nlicense: [mit]\n---\n", "\x00\xff"])
def test_a_base_whose_card_says_nothing_useful(content, world, tmp_path):
    folder, _ = world
    config = load_config(folder / "rpo" / "config.yaml")
    (tmp_path / "README.md").write_text(content, encoding="utf-8")
    text = model_card(
        config, models.read_config(folder / "rpo" / "model"), run_dir=folder / "rpo", step=2, base=str(tmp_path),
        adapter=False,
    )  # fmt: skip
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


def test_hub_names_are_told_where_the_cache_knows_them(world, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out."""
    folder, _ = world
    revision = "0" * 40
    for repository, files in {
        "models--tea-lab--tea-7b": {"config.json": "{}", "README.md": "---\nlicense: mit\n---\n"},
        "datasets--tea-lab--preferences": {"README.md": ""},
    }.items():
        snapshot = tmp_path / repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (tmp_path / repository / "refs").mkdir()
        (tmp_path / repository / "refs" / "main").write_text(revision)
        for name, text in files.items():
            (snapshot / name).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run_dir = folder / "rpo"
    config = rpo_jax.load_config(run_dir / "config.yaml", ["data.path=tea-lab/preferences"])
    architecture = models.read_config(run_dir / "model")
    for adapter in (False, True):
        text = model_card(config, architecture, run_dir=run_dir, step=2, base="tea-lab/tea-7b", adapter=adapter)
        data = ModelCard(text, ignore_metadata_errors=False).data
        assert (data.base_model, data.license, data.datasets) == ("tea-lab/tea-7b", "mit", "tea-lab/preferences")
        assert "on `tea-lab/preferences`" in text
    unknown = model_card(config, architecture, run_dir=run_dir, step=2, base="models/mine", adapter=True)
    assert ModelCard(unknown).data.base_model is None  # it may have been a folder
    assert "LoRA adapters for `mine`" in unknown
    mixed = ["data.path=null", "data.eval_rows=0", "data.mix={tea-lab/preferences: 1, secret/place/own.jsonl: 2}"]
    config = rpo_jax.load_config(run_dir / "config.yaml", mixed)
    text = model_card(config, architecture, run_dir=run_dir, step=2, base="tea-lab/tea-7b", adapter=False)
    assert "on `tea-lab/preferences` and `own.jsonl` with" in text
    assert "secret" not in text
    assert ModelCard(text).data.datasets == "tea-lab/preferences"
