"""Features on disk: the same as in memory but for bfloat16, mixed whole, finished by whoever comes,
and nobody else's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from star_fast.errors import UserError
from star_fast.evaluation import probe_features
from star_fast.evaluation.probe import ProbeConfig, probe, run_probe
from star_fast.evaluation.probe_features import (
    OnDisk,
    Wanted,
    await_all,
    extract_features,
    remove_features,
    store_features,
)
from star_fast.evaluation.probe_result import ProbeResult, table
from star_fast.evaluation.runs import open_run
from star_fast.model.transformer import Transformer

QUICK = {"epochs": 12, "warmup_epochs": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_features, "BLOCK_IMAGES", 7)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run / "run", tmp_path / "run"))


def stored(run: Path, folder: Path, **options: int) -> tuple[list[OnDisk], list[Wanted], torch.Tensor]:
    opened = open_run(run)
    store, model = opened.store, opened.model.transformer
    wanted = [Wanted("train", store.train_indices, [0, 1]), Wanted("held-out", store.held_out_indices, [0])]
    sets = store_features(folder, model, store, wanted, [2, 1], [3, 15], **options)
    whole = torch.stack([extract_features(model, store, store.train_indices, view, [2, 1], [3, 15]) for view in (0, 1)])
    return sets, wanted, whole


def test_chunks_hold_the_features_in_bfloat16(run: Path, tmp_path: Path) -> None:
    sets, _, whole = stored(run, tmp_path / "features")
    train = sets[0]
    assert (train.count, train.heads, train.width, train.chunks) == (30, 4, 16, 5)
    assert torch.equal(torch.cat([block.clone() for block in train.blocks()]), whole[0].bfloat16())
    buffer = torch.empty(7, 4, 16, dtype=torch.bfloat16)
    assert train.read(1, 4, buffer) == 2 and torch.equal(buffer[:2], whole[1, 28:].bfloat16())
    # heads: depth by depth
    opened = open_run(run)
    codes = torch.from_numpy(opened.store._codes[opened.store.train_indices, 0, :15].astype("int64"))
    with torch.no_grad():
        features = opened.model.transformer(codes, torch.full((30,), 3), blocks=(1, 2), logits=False).features
    torch.testing.assert_close(
        whole[0], torch.cat([features[2][:, [3, 15]], features[1][:, [3, 15]]], 1), rtol=1e-4, atol=1e-5
    )


def test_an_epoch_is_every_image_once_in_one_view_and_a_function_of_the_seed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (train, _), _, whole = stored(run, tmp_path / "features")
    monkeypatch.setattr(probe_features, "_WINDOW_BYTES", 2 * train.size_bytes(0))  # two chunks are mixed at once
    epochs = [list(train.epoch(4, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    images = [torch.cat([chosen for _, chosen in epoch]) for epoch in epochs]
    assert [len(epoch) for epoch in epochs] == [7, 7, 7]  # 30 images: two are left over
    assert len(images[0].unique()) == 28 and torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert images[0].tolist() != sorted(images[0].tolist())
    views = set()
    for x, chosen in epochs[0]:
        for row, image in zip(x, chosen.tolist(), strict=True):
            found = [view for view in (0, 1) if torch.equal(row, whole[view, image].bfloat16())]
            assert found, f"image {image} is in no view what the model gives"
            views.update(found)
    assert views == {0, 1}
    buffers = [x.data_ptr() for x, _ in epochs[0]]
    assert len(set(buffers)) == len(buffers)  # a batch is the caller's


def test_ranks_share_the_work_and_a_killed_job_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    sets, *_ = stored(run, folder, rank=1, ranks=3)
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bf16")}
    assert len(done) == 4  # of 5 + 5 + 2 chunks
    with pytest.raises(UserError, match=r"train-view0-000000\.bf16: another rank has not written it for 0\.3 s"):
        await_all(sets, patience_s=0.3)
    seen = []
    extract = probe_features.extract_features
    monkeypatch.setattr(
        probe_features, "extract_features", lambda *args, **options: seen.append(args) or extract(*args, **options)
    )
    sets, *_ = stored(run, folder)
    assert len(seen) == 8 and all((folder / name).stat().st_mtime_ns == time for name, time in done.items())
    await_all(sets, patience_s=0.3)
    (folder / ".train-view0-000000.bf16.1.tmp").write_bytes(b"of a killed one")
    (folder / "mine.txt").write_text("not theirs")
    await_all(sets)
    remove_features(sets)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_other_features_and_damaged_ones_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    sets, wanted, _ = stored(run, folder)
    opened = open_run(run)
    model = opened.model.transformer
    with pytest.raises(UserError, match="holds features of other positions; remove the folder"):
        store_features(folder, model, opened.store, wanted, [2, 1], [3, 14])
    with torch.no_grad():
        model.tok_embeddings.weight[0, 0] += 1
    with pytest.raises(UserError, match="holds features of other weights_sha256"):
        store_features(folder, model, opened.store, wanted, [2, 1], [3, 15])
    path = sets[0].path(0, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="expected 896 bytes, got 895"):
        list(sets[0].blocks())
    (folder / "features.json").unlink()
    with pytest.raises(UserError, match=r"holds features without features\.json"):
        stored(run, folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match=r"the disk has 0\.0 GiB free; give another place with --features"):
        stored(run, tmp_path / "elsewhere")


def test_from_disk_as_from_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 and another order of the images: the same figures but for a few images; the folder is gone afterwards,
    or kept when asked.
    """
    monkeypatch.setattr(probe_features, "BLOCK_IMAGES", 4096)
    options = {**QUICK, "depths": (2, 1), "lr": (2.0, 8.0)}
    memory = run_probe(ProbeConfig(run, **options))
    disk = run_probe(ProbeConfig(run, features=str(run / "there"), keep_features=True, **options))
    again = run_probe(ProbeConfig(run, features=str(run / "there"), **options))
    assert disk == again and not (run / "there").exists()
    for one, other in zip(memory.depths, disk.depths, strict=True):
        assert one.knn == pytest.approx(other.knn, abs=0.2)
        assert torch.tensor(one.train).mean() == pytest.approx(torch.tensor(other.train).mean().item(), abs=0.15)
    monkeypatch.setattr("star_fast.evaluation.probe.physical_bytes", lambda: 1000)
    assert run_probe(ProbeConfig(run, **options)) == disk and not (run / "probe-features").exists()


def test_a_rate_is_chosen_on_images_kept_aside(run: Path) -> None:
    opened = open_run(run)
    result = probe(opened.model.transformer, opened.store, 1, ProbeConfig(run, lr=(1e-9, 5.0), depths=(1, 2), **QUICK))
    assert isinstance(result, ProbeResult)
    # A tenth of each class of 10
    assert (result.train_images, result.kept_aside_images, result.held_out_images) == (27, 3, 12)
    for each in result.depths:
        kept = {row["lr"]: sum(row["kept_aside"]) for row in each.by_lr}
        assert kept[each.lr] == max(kept.values())
        assert each.held_out == next(row["held_out"] for row in each.by_lr if row["lr"] == each.lr)
    assert result.held_out == result.depths[0].held_out and result.depth == 1
    shown = table(result)
    assert (
        "after block 2" in shown
        and "k-NN" in shown
        and "learning rate 1e-09: mean" in shown
        and "27, 3 kept aside" in shown
    )


def test_other_ranks_extract_and_leave(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_features, "BLOCK_IMAGES", 10)
    trained = []
    monkeypatch.setattr("star_fast.evaluation.probe.train_probes", lambda *_: trained.append(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_probe(ProbeConfig(run, **QUICK)) is None and not trained and not (run / "probe.json").exists()
    assert len(list((run / "probe-features").glob("*.bf16"))) == 2  # of 3 + 2
    monkeypatch.undo()
    monkeypatch.setattr(probe_features, "BLOCK_IMAGES", 10)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = run_probe(ProbeConfig(run, **QUICK))
    assert json.loads((run / "probe.json").read_text())["held_out"] == result.held_out


def test_against_another_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no probe\.json; run `star-fast probe"):
        run_probe(ProbeConfig(run, against=str(tmp_path), **QUICK))
    other = Path(shutil.copytree(run, tmp_path / "baseline"))
    run_probe(ProbeConfig(other, **QUICK))
    alone = (other / "probe.png").read_bytes()
    run_probe(ProbeConfig(run, against=str(other), **QUICK))
    assert (run / "probe.png").read_bytes() != alone
    written = json.loads((other / "probe.json").read_text())
    (other / "probe.json").write_text(json.dumps({**written, "held_out": [2.0] * 8}))
    with pytest.raises(UserError, match=r"shares in \[0, 1\]"):
        run_probe(ProbeConfig(run, against=str(other), **QUICK))


def test_a_model_is_not_changed_by_extraction(run: Path) -> None:
    opened = open_run(run)
    model: Transformer = opened.model.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract_features(model, opened.store, torch.tensor([0, 1]), 0, [1], [3])
    assert (
        all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and model.config.blocks == 2
    )
