"""How well models learn, beside something simple or something known: `python -m benchmarks.accuracy NAME`.

    recommender    ratings of items by users, made from hidden tastes: `tabular`, beside the means of user and
                   item, which is what one can do without a model of tastes
    traffic        cars an hour, with days, weeks, weather and jams: `gru`, beside the last hour, the same
                   hour a week ago, and a linear model of the same 48 hours
    scikit-learn   digits and breast cancer: an mlp of ours beside `MLPClassifier` with the same settings
    large-batch    MNIST, batch 64 to 2048: one learning rate for all, and one that grows with the batch after
                   a warm-up (P. Goyal et al., 2017, table 1)

Each is a run of the command `distbp train` with `--nproc 1`; seeds select initial weights, order and split.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SEEDS = range(5)


def main() -> None:
    """Run one comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=["recommender", "traffic", "scikit-learn", "large-batch"])
    parser.add_argument("--mnist", default="../shared/data/mnist-t10k", help="IDX files, for large-batch")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distbp-accuracy-") as folder:
        os.environ["DISTBP_RUN__NPROC"] = "1"
        if arguments.name == "recommender":
            recommender(Path(folder))
        elif arguments.name == "traffic":
            traffic(Path(folder))
        elif arguments.name == "scikit-learn":
            scikit_learn(Path(folder), range(arguments.seeds))
        else:
            large_batch(str(Path(arguments.mnist).absolute()), Path(folder), range(arguments.seeds))


DIVERGED = 79
"""The exit code of a run whose loss was not finite."""


def train(data: str, folder: Path, *settings: str, seed: int = 0, epochs: int = 20) -> Path:
    """Train, and return the run; one that diverged has no result."""
    number = sum(1 for entry in folder.iterdir() if entry.name.startswith("run"))
    out = folder / f"run{number}"
    options = [word for setting in settings for word in ("-o", setting)]
    command = [sys.executable, "-m", "distbp.cli.main", "train", data, *options]
    command += ["--nproc", "1", "--seed", str(seed), "--epochs", str(epochs), "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, DIVERGED):
        raise SystemExit(done.stderr)
    return out


def validation(run: Path) -> dict[str, float]:
    """Return the figures of a run's last validation."""
    figures: dict[str, float] = json.loads((run / "result.json").read_text())["validation"]
    return figures


def evaluated(run: Path, data: str) -> dict[str, float]:
    """Return the figures of a run for a file."""
    command = [sys.executable, "-m", "distbp.cli.main", "evaluate", str(run), data, "--json"]
    figures: dict[str, float] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return figures


def root_mean_square(errors: np.ndarray) -> float:
    """Return the root of the mean of the squares."""
    return float(np.sqrt(np.mean(np.square(errors))))


# ----- a recommender


def recommender(folder: Path) -> None:
    """300 users, 200 items, four hidden tastes, 30,000 ratings and 5,000 more to be guessed."""
    generator = np.random.default_rng(0)
    users, items = generator.integers(0, 300, 35_000), generator.integers(0, 200, 35_000)
    tastes, kinds = generator.normal(size=(300, 4)), generator.normal(size=(200, 4)) / 2
    kindness, quality = generator.normal(size=300) / 2, generator.normal(size=200) / 2
    rating = 3 + kindness[users] + quality[items] + (tastes[users] * kinds[items]).sum(axis=1)
    rating += 0.5 * generator.normal(size=len(rating))
    for name, rows in (("train.csv", slice(0, 30_000)), ("test.csv", slice(30_000, None))):
        with (folder / name).open("w", newline="") as stream:
            columns = (users[rows].tolist(), items[rows].tolist(), rating[rows].round(4).tolist())
            csv.writer(stream).writerows([["user", "item", "target"], *zip(*columns, strict=True)])
    settings = ("model.name=tabular", 'data.categorical=["user","item"]', "optimizer.weight_decay=0.1")
    run = train("train.csv", folder, *settings, epochs=15)
    ours = evaluated(run, str(folder / "test.csv"))["rmse"]
    known, new = slice(0, 30_000), slice(30_000, None)
    mean = rating[known].mean()
    of_user, of_item = means_of(users[known], items[known], rating[known] - mean)
    print(f"{'root mean square error of 5,000 ratings':44}")
    print(f"{'  the mean of all':44}{root_mean_square(rating[new] - mean):8.3f}")
    guess = mean + of_user[users[new]] + of_item[items[new]]
    print(f"{'  means of user and item':44}{root_mean_square(rating[new] - guess):8.3f}")
    print(f"{'  tabular':44}{ours:8.3f}")
    print(f"{'  the noise, which nobody can guess':44}{0.5:8.3f}")


def means_of(users: np.ndarray, items: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each user and each item whose sums come nearest, by turns, ten times."""
    of_user, of_item = np.zeros(users.max() + 1), np.zeros(items.max() + 1)
    for _ in range(10):
        of_user = np.bincount(users, rest - of_item[items]) / np.maximum(1, np.bincount(users))
        of_item = np.bincount(items, rest - of_user[users]) / np.maximum(1, np.bincount(items))
    return of_user, of_item


# ----- traffic


def traffic(folder: Path) -> None:
    """Two years of cars an hour; the next hour from the last 48, the last tenth of the time to be guessed."""
    generator = np.random.default_rng(0)
    hours = np.arange(2 * 365 * 24)
    hour, day = hours % 24, hours // 24 % 7
    rush = np.exp(-((hour - 8) ** 2) / 4) + 1.2 * np.exp(-((hour - 17) ** 2) / 6)
    base = 200 + 900 * np.where(day < 5, rush, 0.5 * np.exp(-((hour - 14) ** 2) / 20))
    weather = smoothed(generator.normal(size=len(hours)), 0.97) * 0.05
    jams = smoothed((generator.random(len(hours)) < 0.004) * generator.uniform(2, 4, len(hours)), 0.7)
    cars = base * np.exp(weather) / (1 + jams) + 15 * generator.normal(size=len(hours))
    clock = [np.sin(2 * np.pi * hour / 24), np.cos(2 * np.pi * hour / 24), (day < 5).astype(float)]
    series = np.stack([cars / 500, *clock], axis=1).astype(np.float32)
    # What is known of the next hour is its place in the day and the week: shift the clock by one.
    series[:-1, 1:] = series[1:, 1:]
    starts = np.arange(168, len(hours) - 49)
    x = np.stack([series[start : start + 48] for start in starts])
    y = cars[starts + 48].astype(np.float32)
    np.savez(folder / "traffic.npz", x=x, y=y)
    shared = ("data.split=tail", "data.normalize=targets", "optimizer.name=adam", "optimizer.lr=0.003")
    names = ("linear", "gru")
    runs = {name: train("traffic.npz", folder, f"model.name={name}", *shared, epochs=8) for name in names}
    held = starts[-round(0.1 * len(starts)) :] + 48
    np.savez(folder / "held.npz", x=x[-len(held) :], y=y[-len(held) :])
    print(f"{'root mean square error, cars an hour':44}")
    print(f"{'  the hour before':44}{root_mean_square(cars[held] - cars[held - 1]):8.1f}")
    print(f"{'  the same hour a week ago':44}{root_mean_square(cars[held] - cars[held - 168]):8.1f}")
    for name, run in runs.items():
        print(f"  {name:42}{evaluated(run, str(folder / 'held.npz'))['rmse']:8.1f}")


def smoothed(values: np.ndarray, memory: float) -> np.ndarray:
    """Return a series that forgets: s_t = memory * s_(t-1) + values_t."""
    state, result = 0.0, np.empty(len(values))
    for index, value in enumerate(values.tolist()):
        state = memory * state + value
        result[index] = state
    return result


# ----- scikit-learn


def scikit_learn(folder: Path, seeds: range) -> None:
    """The same mlp, rule, rate, batch and epochs on both sides; a fifth of the samples is held out."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    print(
        f"{'data':16} {'scikit-learn':>20} {'distbp':>20}   accuracy: mean (deviation) of {len(seeds)} seeds"
    )
    for name, load in (("digits", datasets.load_digits), ("breast cancer", datasets.load_breast_cancer)):
        found: dict[str, list[float]] = {"theirs": [], "ours": []}
        for seed in seeds:
            data = load()
            parts = train_test_split(data.data, data.target, test_size=0.2, random_state=seed)
            x_train, x_test, y_train, y_test = parts
            scaler = StandardScaler().fit(x_train)
            theirs = MLPClassifier(
                (64,), solver="sgd", momentum=0.9, nesterovs_momentum=False, alpha=0, batch_size=64,
                learning_rate_init=0.05, max_iter=40, tol=0, n_iter_no_change=10**6, random_state=seed,
            )  # fmt: skip
            theirs.fit(scaler.transform(x_train), y_train)
            found["theirs"].append(theirs.score(scaler.transform(x_test), y_test))
            file = folder / f"{name.replace(' ', '-')}-{seed}.npz"
            np.savez(file, x_train=x_train, y_train=y_train, x_val=x_test, y_val=y_test)
            settings = ("model.hidden=[64]", "optimizer.lr=0.05", "schedule.name=constant")
            run = train(str(file), folder, *settings, "train.batch_size=64", seed=seed, epochs=40)
            found["ours"].append(validation(run)["accuracy"])
        print(f"{name:16} {shown(found['theirs']):>20} {shown(found['ours']):>20}", flush=True)


def shown(values: list[float]) -> str:
    """Return mean and deviation."""
    return f"{np.mean(values):.4f} ({np.std(values):.4f})"


# ----- large batches


def large_batch(mnist: str, folder: Path, seeds: range) -> None:
    """An mlp for 20 epochs; 0.01 is a good rate for batch 64."""
    print("20 epochs of 8,000 MNIST samples, 2,000 to validate; accuracy: mean (deviation) of each")
    print(f"{'batch':>6} {'steps':>6} {'rate 0.01 for all':>20} {'scaled, after warm-up':>22} {'rate':>6}")
    for batch in (64, 128, 256, 512, 1024, 2048):
        row = []
        for scaling in ("none", "linear"):
            settings = [f"train.batch_size={batch}", "optimizer.lr=0.01", "data.validation_fraction=0.2"]
            settings += [f"schedule.scaling={scaling}", "model.name=mlp"]
            if scaling == "linear":
                settings.append("schedule.scaling_batch=64")
            runs = [train(mnist, folder, *settings, seed=seed) for seed in seeds]
            ended = [run for run in runs if (run / "result.json").exists()]
            lost = f", {len(runs) - len(ended)} diverged" * (len(ended) < len(runs))
            row.append(shown([validation(run)["accuracy"] for run in ended]) + lost)
        rate = 0.01 * batch / 64
        print(f"{batch:6} {-(-20 * 8000 // batch):6} {row[0]:>20} {row[1]:>22} {rate:6.2f}", flush=True)


if __name__ == "__main__":
    main()
