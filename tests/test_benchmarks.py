"""The benchmark's pure parts: the arithmetic it counts, the data it serves, the table it makes. Nothing is timed."""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import real_model, step_profile, suite, table
from benchmarks.cells import ours, torch_common, torch_rpo
from benchmarks.spec import MODELS, CellSpec, peak_rss_bytes
from benchmarks.workloads import BOS, EOS, NUM_EXAMPLES, WORKLOADS, batch_of, make_lengths, make_pairs, timed_work
from rpo_jax import models
from rpo_jax.objectives import contrast, losses
from rpo_jax.tools.planning import arithmetic
from tests import quick_xla
from tests.processes import REPOSITORY

TINY = CellSpec(
    system="ours-cached", workload="A", pairs=4, micro=2, warmup=1, steps=2, model="tiny", shrink=8, settings=()
)


@pytest.mark.parametrize("name", MODELS)
def test_matrix_entries_are_the_model_s(name):
    sizes = MODELS[name]
    config = ours.make_model(ours.make_config(CellSpec(**{**TINY.__dict__, "model": name})))
    norms = sizes.hidden_size * (2 * sizes.num_layers + 1)
    heads = 1 if sizes.tie_embeddings else 2  # the embedding has as many entries as the head
    whole = arithmetic.body_parameters(sizes) + heads * arithmetic.head_parameters(sizes) + norms
    assert whole == models.count_params(config)


def test_visible_pairs_are_those_of_the_mask():
    prompt, responses = 5, (3, 4)
    tokens = [(0, at) for at in range(prompt)]
    tokens += [(branch, prompt + at) for branch, count in enumerate(responses, start=1) for at in range(count)]
    seen = sum(
        key_at <= query_at and key_branch in (0, query_branch)
        for query_branch, query_at in tokens
        for key_branch, key_at in tokens
    )
    assert arithmetic.visible_pairs(prompt, responses) == seen


@pytest.mark.parametrize(("frozen", "per_entry"), [(False, 6), (True, 4)])
def test_necessary_operations_are_those_that_pytorch_counts(frozen, per_entry):
    """One row of T tokens, all scored, attention over T x T: the same formula with every pair visible."""
    spec, length = TINY, 24
    policy: Any = torch_common.make_policy(spec)
    policy.set_attn_implementation("eager")
    if frozen:
        # What comes in still has a gradient, as behind a first layer with adapters.
        policy.requires_grad_(False).model.embed_tokens.requires_grad_(True)
    tokens = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        torch_rpo.log_probs(policy, tokens, torch.ones_like(tokens), torch.ones_like(tokens)).sum().backward()
    sizes = spec.sizes
    matrices = per_entry * length * (arithmetic.body_parameters(sizes) + arithmetic.head_parameters(sizes))
    attention = 12 * sizes.num_layers * sizes.num_heads * sizes.head_dim * length**2
    # The rotary tables are a small product of their own.
    assert counter.get_total_flops() == pytest.approx(matrices + attention, rel=1e-3)
    # One token fewer is scored than the sequence has, and causal attention sees half of the square.
    ours_counted = arithmetic.necessary_flops(sizes, 1, (length - 1,), frozen=frozen)
    unscored, unseen = per_entry * arithmetic.head_parameters(sizes), attention * (1 - (length + 1) / (2 * length))
    assert ours_counted == pytest.approx(matrices + attention - unscored - unseen)


@pytest.mark.parametrize(
    ("workload", "prompt", "response"),
    [("A", (32, 256), (16, 256)), ("B", (192, 256), (16, 64)), ("H", None, None), ("S", None, None)],
)
def test_lengths_are_the_workload_s(workload, prompt, response):
    lengths = make_lengths(workload, NUM_EXAMPLES, seed=0)
    assert lengths.shape == (NUM_EXAMPLES, 3)
    np.testing.assert_array_equal(lengths, make_lengths(workload, NUM_EXAMPLES, seed=0))
    assert (lengths != make_lengths(workload, NUM_EXAMPLES, seed=1)).any()
    if prompt is not None:
        assert (lengths[:, 0].min(), lengths[:, 0].max()) == prompt
        assert (lengths[:, 1:].min(), lengths[:, 1:].max()) == response
    assert (lengths[:, :1] + lengths[:, 1:]).max() <= 512, "as the product cuts them"


def test_hh_lengths_waste_what_was_measured():
    """The two-row layout's positions per token needed, as counted on the file with another tokenizer: 3.4 and 4.6."""
    lengths = make_lengths("H", NUM_EXAMPLES, seed=0)
    for pairs, factor in ((8, 3.4), (64, 4.6)):
        longest = (lengths[:, :1] + lengths[:, 1:]).max(1).reshape(-1, pairs).max(1)
        assert 2 * pairs * longest.sum() / lengths.sum() == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_system_gets_the_same_batches(workload):
    spec = CellSpec(**{**TINY.__dict__, "workload": workload})
    pairs = make_pairs(spec)
    run = ours.Run(spec, ours.make_config(spec))
    for step in range(3):
        batch, wanted = run.batches.batch_at(step), batch_of(spec, pairs, step)
        packed = np.asarray(batch.tokens)[np.asarray(batch.response_ids) >= 0]
        scored = [token for pair in wanted for token in pair.chosen + pair.rejected]
        assert sorted(packed.tolist()) == sorted(scored)
        assert (np.asarray(batch.segment_ids) > 0).sum() == sum(pair.useful_tokens for pair in wanted)
        rows, attention, mask = torch_rpo.padded_rows(wanted, torch.device("cpu"))
        assert sorted(rows[mask.bool()].tolist()) == sorted(scored)
        assert int(attention.sum()) == sum(pair.useful_tokens + len(pair.prompt) for pair in wanted)
    assert all(pair.prompt[0] == BOS and pair.chosen[-1] == pair.rejected[-1] == EOS for pair in pairs)
    tokens, flops = timed_work(spec, pairs)
    assert tokens == [sum(pair.useful_tokens for pair in batch_of(spec, pairs, step)) for step in (1, 2)]
    assert len(flops) == spec.steps


def test_the_pytorch_step_s_loss_is_rpo():
    pairs = make_pairs(TINY)[:4]
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 8)).astype(np.float32) * 20
    weights = torch_rpo.contrast_weights(pairs, torch.device("cpu"))
    embeddings = jnp.stack([pair.embedding for pair in pairs])
    expected = contrast.embedding_weights(embeddings, embeddings, temperature=0.5)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)
    ratio = policy - reference
    loss = losses.pairwise_loss(jnp.array(ratio[:4]), jnp.array(ratio[4:]), expected, beta=0.1)
    found = torch_rpo.rpo_loss(torch.tensor(policy), torch.tensor(reference), weights)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)


def test_padding_does_not_change_pytorch_s_log_probs():
    policy = torch_common.make_policy(TINY).eval()
    pairs = sorted(make_pairs(TINY)[:4], key=lambda pair: pair.useful_tokens)
    with torch.no_grad():
        together = torch_rpo.log_probs(policy, *torch_rpo.padded_rows(pairs, torch.device("cpu")))
        alone = torch_rpo.log_probs(policy, *torch_rpo.padded_rows(pairs[:1], torch.device("cpu")))
    np.testing.assert_allclose(together[[0, 4]], alone, atol=1e-4)


def test_cells_take_turns():
    options = suite.parse_arguments(["--workloads", "A,H", "--pairs", "8,64", "--systems", "ours-cached,trl"])
    cells = suite.make_cells(options)
    turn = ["ceiling-jax", "ceiling-torch", "ours-cached", "trl"]
    assert [cell.system for cell in cells] == turn * 8
    assert [(cell.repeat, cell.workload, cell.pairs) for cell in cells[::4]] == [
        (repeat, workload, pairs) for repeat in (0, 1) for workload in "AH" for pairs in (8, 64)
    ]
    assert CellSpec.from_json(cells[2].to_json()) == cells[2]
    with pytest.raises(SystemExit):
        suite.parse_arguments(["--systems", "ours-cached,theirs"])


def test_workload_s_has_its_own_model_and_lora_is_every_system_s():
    options = suite.parse_arguments(["--workloads", "H,S", "--pairs", "8", "--lora-rank", "16", "--repeats", "1"])
    cells = suite.make_cells(options)
    assert {(cell.workload, cell.model) for cell in cells} == {("H", "small"), ("S", "smollm2-135m")}
    assert {cell.lora_rank for cell in cells} == {16}
    assert "S" not in suite.parse_arguments([]).workloads, "which takes as long as all others"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_trains_the_same_adapters_in_every_system_and_nothing_else():
    spec = CellSpec(**{**TINY.__dict__, "lora_rank": 4, "system": "ours-live"})
    run = ours.Run(spec, ours.make_config(spec))
    before = jax.tree.map(np.asarray, run.params)
    run.begin()
    assert run.reference is not None, "the frozen weights themselves"
    batch = run.batches.batch_at(0)
    first = float(run.step(batch)["loss"])
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    assert float(run.step(batch)["loss"]) < first, "the adapters have learnt"
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, run.reference))

    policy: Any = get_peft_model(torch_common.make_policy(spec), torch_common.make_lora(spec))
    mine = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in mine) == trained
    optimizer = torch.optim.RMSprop(mine, lr=1e-4)
    pairs = batch_of(spec, make_pairs(spec), 0)
    losses = [torch_rpo.train_step(spec, policy, None, optimizer, pairs) for _ in range(2)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6), "its reference is the policy without its adapters"
    assert losses[1] < losses[0]


def test_ids_beside_trl_s_are_counted_by_how_they_differ():
    mine = [[[1, 5], [6, 2], [7, 2]]] * 4
    theirs = [
        [[1, 5], [6, 2], [7, 2]],
        [[1, 5], [6, 2, 9], [7, 2, 9]],  # what a template writes after an end token
        [[1, 5], [6, 2, 9], [7, 2]],
        [[1], [5, 6, 2], [5, 7, 2]],
    ]
    found = list(real_model.token_lines("rows", mine, theirs))
    assert [line.found for line in found] == ["4", "1", "1", "2: 2, 3"]
    assert "[9]" in found[2].what
    assert [line.holds for line in found] == [None, None, None, False]


def test_a_real_model_s_differences_are_held_to_their_bounds(tmp_path):
    plan = real_model.Plan(model="", data={"rows": ""}, folder=str(tmp_path), pairs=1)
    assert real_model.Plan.from_json(plan.to_json()) == plan
    ids = {"rows": [[[1], [2], [3]]]}
    steps = {"loss": [0.7, 0.6], "grad_norm": [9.0, 8.0], "rewards/chosen": [0.0, 0.1], "rewards/rejected": [0.0, -0.1]}
    dpo = {"rows": {"log_probs": [[-100.0, -50.0]], **steps}}
    logits = {"positions": 9, "largest": 40.0, "argmax_equal": 9, "relative": 2e-6}
    logits |= dict.fromkeys(("ours_torch32", "torch32_torch64", "ours_torch64"), 8e-5)
    greedy = {"count": 2, "same_prompts": 2, "same": 2, "tokens": 8, "ended": 1, "gaps": []}
    lora = {"changed": 0.5, "relative": 1e-6}
    plan.write("ids", {"all": ids, "batch": ids})
    plan.write("ours", {"logits": logits, "greedy": greedy, "dpo": dpo, "lora": lora, "gradient_norm": 9.00001})
    other = {"log_probs": [[-100.001, -50.0]], "own_log_probs": [[-100.2, -50.0]], **steps}
    plan.write("trl", {"ids": ids, "dpo": {"rows": other}})
    found = list(real_model.lines(plan))
    assert not any(line.holds is False for line in found)
    assert sum(line.holds is True for line in found) == 12
    other["loss"] = [0.7, 0.6002]
    plan.write("trl", {"ids": ids, "dpo": {"rows": other}})
    assert [line.what for line in real_model.lines(plan) if line.holds is False] == ["DPO on rows: losses of 3 steps"]


def test_results_name_no_interpreter_of_this_machine():
    given = ["--tiny", "--peers-python", "/here/python", "--pairs", "8", "--dev-python=/there/python", "--steps", "2"]
    assert suite.without_interpreters(given) == ["--tiny", "--pairs", "8", "--steps", "2"]


@pytest.mark.parametrize(("code", "status"), [("pass", "ok"), ("raise SystemExit(3)", "failed (3)")])
def test_a_cell_s_end_is_told(code, status):
    process = subprocess.Popen([sys.executable, "-c", code])
    assert suite.watch(process, suite.Limits(2**40, 300)) == status


def test_a_cell_above_its_memory_is_stopped():
    process = subprocess.Popen([sys.executable, "-c", "import time; x = b'1' * 2**28; time.sleep(300)"])
    assert suite.watch(process, suite.Limits(2**27, 300)) == "out of memory"
    assert process.returncode != 0
    assert peak_rss_bytes() > 2**20


def _record(system: str, seconds: list[float], repeat: int = 0, **measured) -> dict:
    spec = {"system": system, "workload": "A", "pairs": 8, "micro": 8, "settings": [], "repeat": repeat}
    values = {
        "step_seconds": seconds,
        "useful_tokens": [1000] * len(seconds),
        "necessary_flops": [4e9] * len(seconds),
        "first_step_seconds": 9.0 - repeat,
        "reference_seconds": 0.0,
        "peak_rss_bytes": 2**30,
        "peak_device_bytes": 0,
    }
    return {"spec": spec, "status": "ok", "measured": {**values, **measured}}


def test_the_table_compares_with_the_fastest_peer():
    records = [
        {"spec": {"system": "ceiling-jax"}, "status": "ok", "measured": {"flops_per_second": {"a": 8e9, "b": 1e10}}},
        _record("ours-cached", [1.0, 2.0], processor_seconds=[1.5, 2.5]),
        _record("ours-cached", [1.0, 4.0], repeat=1),
        _record("torch-rpo", [5.0, 5.0], peak_rss_bytes=2**31),
        _record("trl", [9.0, 9.0]),
        {**_record("trl-best", []), "status": "out of memory", "measured": {}},
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.render(records).splitlines()]
    cells = {line[2]: dict(zip(table.COLUMNS, line, strict=True)) for line in lines if len(line) > 3}
    first = cells["ours-cached"]
    assert first["seconds a step (min-max)"] == "1.50 (1.00-4.00)"
    # Steps of 1 and, at the median of both rounds, 3 seconds: 2 each.
    assert (first["pairs/s"], first["useful tokens/s"], first["speed-up"]) == ("4.00", "500", "2.50")
    assert (first["share of ceiling"], first["memory ratio"], first["first step, s"]) == ("20%", "0.50", "9.0 / 8.0")
    assert (first["processor s"], cells["trl"]["processor s"]) == ("2.00", "")
    assert cells["torch-rpo"]["speed-up"] == "1.00"
    assert cells["trl"]["speed-up"] == "0.56"
    assert cells["trl-best"]["seconds a step (min-max)"] == "out of memory"


def test_a_peer_trains_the_same_weights_in_the_same_numbers():
    records = [
        _record("trl", [4.0]),
        _record("trl", [9.0]),
        _record("ours-cached", [3.0]),
        _record("ours-cached", [1.0]),
    ]
    for record in records[1:3]:
        record["spec"] |= {"lora_rank": 16}
    records[3]["spec"] |= {"dtype": "bfloat16"}
    rows = {row.system: row for row in table.make_rows(records)}
    assert table.fastest_peer(rows.values(), rows["ours-cached (LoRA 16)"]) is rows["trl (LoRA 16)"]
    assert table.fastest_peer(rows.values(), rows["trl"]) is rows["trl"]
    assert table.fastest_peer(rows.values(), rows["ours-cached (bfloat16)"]) is None


def test_the_table_goes_between_its_marks():
    document = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    inserted = table.insert(document, "| new |")
    assert inserted == f"before\n{table.BEGIN}\n\n| new |\n\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="add them"):
        table.insert("no marks", "| new |")


def test_cells_of_two_processors_make_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    (tmp_path / "cells.jsonl").write_text(json.dumps({"machine": {"processor": "another one"}, "arguments": []}) + "\n")
    assert suite.main(["--name", "cells", "--append", "--systems", "ours-cached"]) == 2
    assert "has cells of another one, and this is" in capsys.readouterr().err


def test_a_step_s_parts_are_told_by_their_scopes():
    """Three layers of a product of [8, 16] and [16, 16], forward and twice backward, under an optimizer's sum."""

    def loss(weights, x):
        with jax.named_scope("mlp"):
            layer = jax.checkpoint(lambda x, weight: jnp.tanh(x @ weight))
            return jnp.sum(jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, weights)[0])

    @jax.jit
    def step(weights, x):
        found = jax.grad(loss)(weights, x)
        with jax.named_scope("optimizer"):
            return weights - 0.1 * found

    weights, x = jnp.ones((3, 16, 16)), jnp.ones((8, 16))
    text = step.lower(weights, x).compile().as_text()
    program = step_profile.parse(text)
    ran = dict.fromkeys(program.computations[program.entry], (1, 1.0))
    for name, computation in program.computations.items():
        if name != program.entry and not any(
            name in one.called for c in program.computations.values() for one in c.values() if one.opcode == "fusion"
        ):
            ran |= dict.fromkeys(computation, (3, 3.0))
    found = step_profile.parts(text, ran)
    product = 2.0 * 8 * 16 * 16
    assert found["mlp products, backward"].operations == 3 * 2 * product
    assert found["mlp products, forward"].operations in (3 * product, 6 * product)  # again in the backward pass
    assert found["optimizer"].operations == 0
    assert found["optimizer"].bytes >= 3 * weights.nbytes


@pytest.mark.slow
def test_parts_of_a_token_are_printed():
    command = [sys.executable, "-m", "benchmarks.generate", "--parts", "--model", "tiny", "--batch", "2"]
    command += ["--prompt-tokens", "8", "--new-tokens", "4"]
    environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}  # on one device
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    whole, prompts, products, _, _ = (float(line.split()[0]) for line in lines)
    assert min(whole, prompts, products) > 0
    cache = 2 * 4 * 2 * 2 * (8 + 4 / 2) * 2 * 16  # keys and values, bytes, layers, rows, slots, heads, their dimension
    assert f"its cache, {cache / 1e6:.3g} MB at " in lines[-1]


@pytest.mark.slow
def test_the_suite_times_systems_side_by_side(tmp_path):
    """`benchmarks/run.sh` with the peer that needs no environment of its own; what is measured is not looked at."""
    command = ["bash", "benchmarks/run.sh", "--tiny", "--systems", "ours-cached,torch-rpo", "--workloads", "A"]
    command += ["--pairs", "8", "--steps", "1", "--warmup", "0", "--repeats", "1", "--name", str(tmp_path / "results")]
    environment = os.environ | {"DEV_PYTHON": sys.executable, "PEERS_PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *cells = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [cell["status"] for cell in cells] == ["ok"] * 4
    timed = [cell for cell in cells if "step_seconds" in cell["measured"]]
    assert [cell["spec"]["system"] for cell in timed] == ["ours-cached", "torch-rpo"]
    assert timed[0]["measured"]["necessary_flops"] == timed[1]["measured"]["necessary_flops"] != [0]
