"""scikit-learn's MLPClassifier on a workload's data: run by `benchmarks.peers`, never alone.

Each epoch is one `partial_fit`, which shuffles and walks through the data in batches; its time, divided by
the number of batches, counts as the time of one step.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import sklearn
from sklearn.neural_network import MLPClassifier


def main():
    """Train for some epochs, and write the mean seconds of a step in each."""
    with open(sys.argv[1]) as file:
        specification = json.load(file)
    with np.load(specification["data"]) as file:
        x, y = file["x"], file["y"]
    x = (x - x.mean()) / x.std()
    batch = specification["batch"]
    network = MLPClassifier(
        specification["model"]["hidden"],
        solver="sgd",
        alpha=0.0,
        batch_size=batch,
        learning_rate_init=0.01,
        momentum=0.9,
        nesterovs_momentum=False,
        random_state=0,
    )
    steps, times = len(x) // batch, []
    for _ in range(max(3, round(specification["steps"] / steps))):
        begun = time.perf_counter()
        network.partial_fit(x, y, classes=np.arange(specification["outputs"]))
        times.append((time.perf_counter() - begun) / steps)
    count = sum(array.size for array in [*network.coefs_, *network.intercepts_])
    found = {"step_s": times, "num_parameters": int(count), "sklearn": sklearn.__version__}
    with open(specification["out"], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
