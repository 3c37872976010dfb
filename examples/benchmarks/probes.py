"""
Probes of random embeddings with class structure: ours against scikit-learn's estimators, CPU time and accuracy.

    OMP_NUM_THREADS=1 python examples/benchmarks/probes.py
    OMP_NUM_THREADS=1 python examples/benchmarks/probes.py --probes ridge --clips 7200 --dim 9216 --ours_only
"""

import argparse
import time

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asit_hf.evaluation.probes import PROBES, RIDGE_WEIGHT_DECAYS, WEIGHT_DECAYS


def make_clips(clips: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training clips, a quarter as many test clips, and their labels."""
    generator = np.random.default_rng(0)
    labels = np.arange(clips + clips // 4) % classes
    centers = generator.normal(size=(classes, dim)) * 3 / np.sqrt(dim)
    x = (centers[labels] + generator.normal(size=(len(labels), dim))).astype(np.float32)
    return x[:clips], labels[:clips], x[clips:], labels[clips:]


def scikit_learn(
    probe: str, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> float:
    """Accuracy of the corresponding estimator with the same candidates and number of folds."""
    if probe == "knn":
        model = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        return float(model.fit(train_x, train_y).score(test_x, test_y))
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(train_x, train_y))
    if probe == "linear":
        model, name = LogisticRegression(max_iter=500), "logisticregression__C"
        candidates = [1 / (decay * len(train_x)) for decay in WEIGHT_DECAYS]
        search = GridSearchCV(make_pipeline(StandardScaler(), model), {name: candidates}, cv=folds)
        return float(search.fit(train_x, train_y).score(test_x, test_y))
    targets = np.eye(train_y.max() + 1)[train_y]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": [decay * len(train_x) for decay in RIDGE_WEIGHT_DECAYS]},
        scoring=lambda model, x, y: (model.predict(x).argmax(1) == y.argmax(1)).mean(),
        cv=folds,
    )
    return float((search.fit(train_x, targets).predict(test_x).argmax(1) == test_y).mean())


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1600, help="training clips (default: 1600)")
    parser.add_argument("--dim", type=int, default=384, help="dimensions of an embedding (default: 384)")
    parser.add_argument("--classes", type=int, default=50, help="number of classes (default: 50)")
    parser.add_argument("--probes", nargs="+", choices=tuple(PROBES), default=list(PROBES), help="probes to compare")
    parser.add_argument("--ours_only", action="store_true", help="skip scikit-learn, which takes minutes if wide")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to check that it runs")
    args = parser.parse_args(arguments)
    data = make_clips(120, 8, 4) if args.quick else make_clips(args.clips, args.dim, args.classes)
    rows = []
    print("| probe | ours, s | accuracy | scikit-learn, s | accuracy | ratio |\n|---|---|---|---|---|---|")
    for probe in args.probes:
        start = time.process_time()
        accuracy = PROBES[probe](data[:2], data[2:])["accuracy"]
        row = {"probe": probe, "accuracy": accuracy, "seconds": time.process_time() - start}
        line = f"| {probe} | {row['seconds']:.2f} | {row['accuracy']:.4f} |"
        if not args.ours_only:
            start = time.process_time()
            row["their_accuracy"] = scikit_learn(probe, *data)
            row["their_seconds"] = time.process_time() - start
            ratio = row["their_seconds"] / row["seconds"]
            line += f" {row['their_seconds']:.2f} | {row['their_accuracy']:.4f} | {ratio:.1f} |"
        print(line if not args.ours_only else f"{line} - | - | - |", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
