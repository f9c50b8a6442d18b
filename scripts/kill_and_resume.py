"""Kill a sampling job again and again (SIGKILL at random moments), let it finish, and compare its file with an unbroken run's, byte by byte.

    python scripts/kill_and_resume.py [--kills 20] [--ranks 2] [--seed 0]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from star_fast.generation.sample import SampleConfig, sample_images  # noqa: E402 (needs the path above)
from tests.generation.small_model import save_small_model  # noqa: E402


def rank_process(config: SampleConfig, rank: int, ranks: int) -> None:
    """One rank of a job."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    sample_images(config)


def main() -> int:
    """0 if the files are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the job that is killed; the unbroken run has one")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")  # of the processes
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["star_fast.generation.sample", "torch._dynamo"])
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        save_small_model(Path(folder) / "model")
        config = SampleConfig(model=f"{folder}/model", out=f"{folder}/unbroken.npz", images=3000, batch_images=16, precision="fp32", grid=False)
        started = time.perf_counter()
        unbroken = processes.Process(target=rank_process, args=(config, 0, 1))
        unbroken.start()
        unbroken.join()
        whole_s = time.perf_counter() - started
        config = replace(config, out=f"{folder}/killed.npz")
        parts, out = Path(f"{config.out}.parts"), Path(config.out)
        killed = 0
        while killed < arguments.kills and not out.exists():
            job = [processes.Process(target=rank_process, args=(config, rank, arguments.ranks)) for rank in range(arguments.ranks)]
            for process in job:
                process.start()
            # Anywhere from before the first batch to several batches on: all kills together take about half as long as the unbroken run.
            time.sleep(moments.random() * whole_s / arguments.kills)
            for process in moments.sample(job, len(job)):
                process.kill()
                process.join()
            killed += not out.exists()
            delivered = len(list(parts.glob("batch-*.npy"))) if parts.exists() else 0
            size = (parts / "unfinished.npz").stat().st_size if (parts / "unfinished.npz").exists() else 0
            print(f"kill {killed}: {delivered} batches delivered, {size} bytes of the file written", flush=True)
        sample_images(config)
        same = out.read_bytes() == Path(f"{folder}/unbroken.npz").read_bytes()
        verdict = "byte-equal to" if same else "DIFFERENT from"
        print(f"{killed} kills of {arguments.ranks} ranks: the file of {out.stat().st_size} bytes is {verdict} the unbroken run's")
        return 0 if same and killed == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
