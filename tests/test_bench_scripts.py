"""The benchmarks run, on sizes that take seconds, and print what they promise. No time is asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

from hfkd.losses import LOSSES, STATE_LOSSES

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script: str, *arguments: str) -> str:
    """What a script prints, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.fixture
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import a script."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_objective_prints_every_row_and_verdict(tmp_path: Path) -> None:
    """Damage: a benchmark that fails, or drops the row that looks bad, and is found out on the day of a release."""
    printed = run(
        "bench_objective.py", "--sizes", "24x16x300", "--heads", "trained", "--repeats", "2", "--json", f"{tmp_path}/o"
    )
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == len(set(rows)) == 8, printed
    for word in ("bare matrix products", "hfkd reverse_kl", "TRL ChunkedDivergenceFunction", "TRL GKD"):
        assert any(row.startswith(word) for row in rows), word
    assert printed.count("wanted at most") == 3
    (case,) = json.loads((tmp_path / "o").read_text())["cases"]
    assert all(len(found["seconds"]) == 2 and found["memory"] >= 0 for found in case["results"].values())
    assert [target["met"] for target in case["targets"]] == [
        target["ratio"] <= target["limit"] for target in case["targets"]
    ]


def test_objective_refuses_to_time_a_wrong_value(scripts_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage: a fast implementation that computes something else wins the comparison."""
    import bench_objective as bench
    from bench_rows import Inputs, Run, ours

    case = bench.Case(8, 16, 50, True, "cpu", "float32")
    bench.check_values(case, list(bench.IMPLEMENTATIONS))

    def halved(inputs: Inputs) -> Run:
        right = ours("forward_kl")(inputs)
        return lambda: right() / 2

    monkeypatch.setitem(bench.IMPLEMENTATIONS, bench.FORWARD, halved)
    with pytest.raises(SystemExit, match="value of 'hfkd forward_kl'"):
        bench.check_values(case, list(bench.IMPLEMENTATIONS))


def test_losses_print_every_row_and_verdict(tmp_path: Path) -> None:
    """Damage: a new loss is never measured, or a peer that isn't there leaves the table without a word."""
    sizes = ("--sizes", "24x16x300", "--repeats", "1", "--memory-kinds", "forward_kl", "--memory-rows", "16", "32")
    printed = run("bench_losses.py", *sizes, "--json", f"{tmp_path}/l", "--plot", f"{tmp_path}/l.png")
    first, states, memory = printed.split("\nToken losses")[1].split("| what")[1:]
    rows = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("|")]
    for kind in LOSSES:
        assert sum(row.split()[:2] == ["hfkd", kind] for row in rows) == 1, kind
    for peer in ("TRL ChunkedDivergenceFunction", "TRL GKD", "TRL SDFT", "Liger"):
        for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
            assert sum(row.startswith(peer) and kind in row for row in rows) == 1, (peer, kind)
    assert all(f"hfkd {kind} " in states for kind in STATE_LOSSES)
    assert memory.count("| hfkd forward_kl ") == 2 and printed.count("wanted at most") == len(LOSSES)
    (case,) = json.loads((tmp_path / "l").read_text())["cases"]
    assert len(case["targets"]) == len(LOSSES) + 1
    for name, found in case["results"].items():
        assert ("time" in found) != bool(found["why_not"]), name
    for found in case["memory"]["hfkd forward_kl"].values():
        assert 0 < found["added"] - found["working"] <= 4 * 16 * (300 + 32)
    assert (tmp_path / "l.png").stat().st_size > 10_000


def test_losses_refuse_to_time_a_wrong_value(scripts_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage: a loss whose value depends on the chunks, or a peer that computes something else, is given a time."""
    import bench_losses as bench
    from bench_rows import Inputs, Prepare, Run, ours, trl_gkd

    case = bench.Case(130, 8, 40, True, "cpu", "float32")
    assert bench.check_ours("total_variation", case) < 1e-4

    def in_small_chunks_only(terms: list, chunk_size: int | None = None) -> Prepare:
        return doubled(ours(terms, chunk_size)) if chunk_size == 64 else ours(terms, chunk_size)

    def doubled(right: Prepare) -> Prepare:
        def prepare(inputs: Inputs) -> Run:
            found = right(inputs)
            return lambda: 2 * found()

        return prepare

    monkeypatch.setattr(bench, "ours", in_small_chunks_only)
    with pytest.raises(SystemExit, match="value of 'total_variation'"):
        bench.check_ours("total_variation", case)
    gap, why_not = bench.check_peer(bench.Peer("trl", "forward_kl", doubled(trl_gkd("forward_kl"))), case)
    assert gap == pytest.approx(1.0, rel=1e-3) and why_not.startswith("its value is off by 1")
    assert bench.check_peer(bench.Peer("trl", "forward_kl", trl_gkd("forward_kl")), case)[1] == ""
    assert "isn't installed" in bench.check_peer(bench.Peer("no-such-package", "forward_kl", ours("")), case)[1]


def test_growth_of_memory_is_that_of_its_line(scripts_on_path: None) -> None:
    """Damage: memory that grows with the rows is called flat."""
    from bench_losses import growth

    assert growth({1: 5.0, 2: 5.0, 16: 5.0}) == 0
    assert growth({1000: 90.0, 2000: 100.0, 3000: 110.0}) == pytest.approx(0.2)


def test_added_memory_is_what_a_run_takes(scripts_on_path: None) -> None:
    """Damage: the peak is read before the run, or of the whole process, and any claim on memory is noise."""
    from bench_measuring import peak_above_now

    size = 64 * 2**20
    found = peak_above_now(lambda: torch.ones(size // 4).sum(), "cpu")
    assert 0.9 * size < found < 1.5 * size


def test_self_teacher_prints_both_tables(tmp_path: Path) -> None:
    """Damage: the two trainers stop reading the same tokens (another template, another loss), and nobody notices
    because nothing compares their prompts and first losses.
    """
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    sizes = ("--shared", "48", "--own", "12", "--demonstration-tokens", "60", "--batch", "2", "--steps", "2")
    printed = run(
        "bench_self_teacher.py", "--model", f"{tmp_path}/model", *sizes, "--repeats", "1", "--json", f"{tmp_path}/s"
    )
    for words in ("shared prefix reused", "TRL SDFTTrainer", "hfkd, answers written beforehand", "of the first step"):
        assert words in printed, printed
    report = json.loads((tmp_path / "s").read_text())
    assert report["forward"]["gap"] <= 1e-3
    ours, theirs = report["step"]["losses"]
    assert ours > 0 and ours == pytest.approx(theirs, rel=1e-3)
    assert all(len(seconds) == 1 for seconds in report["step"]["seconds"].values())


def test_different_work_is_refused(scripts_on_path: None) -> None:
    """Damage: a step is called faster although it read shorter prompts, wrote shorter answers or has another loss."""
    from bench_steps import Lengths, check_same_work

    lengths = Lengths(64, 16, 8, 64, 8, 4, 2)
    ours = {"answers": [4, 4], "prompts": [[1, 2]], "loss": 1.0}
    check_same_work(ours, dict(ours), lengths)
    for theirs in ({**ours, "prompts": [[1, 3]]}, {**ours, "loss": 1.1}):
        with pytest.raises(SystemExit):
            check_same_work(ours, theirs, lengths)
    with pytest.raises(SystemExit, match="tokens were written"):
        check_same_work({**ours, "answers": [4, 3]}, None, lengths)


def test_cache_prints_its_tables(tmp_path: Path) -> None:
    """Damage: a codec is dropped from the table, its error is taken from another codec's cache, or an epoch is timed
    that read something else than the teacher.
    """
    make_model(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = "the quick brown fox jumps over a lazy dog and asks what its past tense is".split()
    texts = [" ".join(words[place:] + words[:place]) for place in range(12)]
    (tmp_path / "texts").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = ("--model", f"{tmp_path}/model", "--texts", f"{tmp_path}/texts", "--held-out", f"{tmp_path}/texts")
    sizes = ("--layers", "2", "--rows", "8", "--held-out-rows", "6", "--batch", "4", "--repeats", "1")
    printed = run("bench_cache.py", *files, *sizes, "--json", f"{tmp_path}/c")
    report = json.loads((tmp_path / "c").read_text())
    assert printed.count("wanted at most 1.1") == len(report["epoch"]["targets"]) == 5
    codecs, dense = report["error"]["codecs"], report["error"]["dense"]["2 blocks"]
    assert len(codecs) == 18 and all(f"| {name} " in printed for name in codecs)
    error = {name: found["students"]["2 blocks"]["error"] for name, found in codecs.items()}
    assert error["topk K=8"] > error["topk K=32"] > error["topk K=128"] > error["hidden float32"]
    assert error["sampled 12"] > error["sampled 200"] > error["hidden bfloat16"] > error["hidden float32"]
    assert error["hidden float32"] < 1e-5 < dense
    for found in codecs.values():
        one = found["students"]["2 blocks"]
        assert one["bias"] == pytest.approx(one["cached"] - dense, abs=1e-5)
    losses = {name: found["loss"][0] for name, found in report["epoch"]["found"].items()}
    assert losses["hidden float32"] == pytest.approx(losses["teacher in memory"], rel=1e-5)
    assert all(len(found["seconds"][0]) == 1 for found in report["epoch"]["found"].values())


def test_an_evenly_spread_tail(scripts_on_path: None) -> None:
    """Damage: what is called the distribution of a cache doesn't sum to 1."""
    from bench_cache_errors import decode_rows

    from hfkd.rows import TopKRows

    rows = TopKRows(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.2]]).log(), 5, tail=torch.tensor([0.3]).log())
    torch.testing.assert_close(decode_rows(rows).exp(), torch.tensor([[0.1, 0.2, 0.1, 0.5, 0.1]]))


def test_packing_prints_both_cases(tmp_path: Path) -> None:
    """Damage: padding counts as speed, or the verdict is given on texts of one length."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name, repeats in (("varied", (1, 2, 3, 9)), ("alike", (2, 2, 2, 2))):
        texts = ["the quick brown fox jumps over a lazy dog " * count for count in repeats]
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files = ("--model", f"{tmp_path}/model", "--texts", f"{tmp_path}/{name}", "--json", f"{tmp_path}/p")
        printed = run("bench_packing.py", *files, "--cases", "alone", "teacher", "--batch", "4", "--batches", "2")
        report = json.loads((tmp_path / "p").read_text())
        assert printed.count("wanted at least 1.5") == (2 if name == "varied" else 0)
        assert report["texts"]["padding"] == pytest.approx(1 - 15 / 36 if name == "varied" else 0, abs=0.02)
        for case in ("alone", "teacher"):
            assert report[case]["loss_gap"] < 1e-5 and report[case]["gradient_gap"] < 1e-4
            assert len(report[case]["speed"]["padding-free"]) == 2


def test_packing_refuses_to_time_other_gradients(
    scripts_on_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage: a fast run that mixes the texts wins the comparison."""
    import bench_packing as bench

    import hfkd.packing as packing

    view = bench._padded([list(range(3, 3 + count)) for count in (4, 9, 20)], 1.0)
    learner = bench.Learner(make_model(), make_model(seed=1), "forward_kl", str(tmp_path))
    assert max(learner.compare(view)) < 1e-5
    attend = packing._one_by_one
    monkeypatch.setattr(
        packing, "_one_by_one", lambda q, k, v, lengths, *rest, **more: attend(q, k, v, [sum(lengths)], *rest, **more)
    )
    with pytest.raises(SystemExit, match="of the gradients"):
        learner.compare(view)
