"""
Baseline of MFCC statistics and a classical classifier.

    python -m examples.experiments.mfcc --train train.csv --test test.csv

A clip is represented by the mean and standard deviation over time of 20 MFCCs and of their first differences; a random
forest and a logistic regression are fitted on the training clips. Options are those of examples/run_linear_probe.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.fft import dct
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from asit_hf import ASiTFeatureExtractor
from asit_hf.data import LabelledClips, label_names
from asit_hf.data.labelled import DatasetArguments, problem_type_of, targets
from asit_hf.utils.arguments import run_script
from examples import run_linear_probe as probe

NUM_COEFFICIENTS = 20
TREES = 500


def mfcc_statistics(clips: LabelledClips) -> np.ndarray:
    """`(clips, 4 * 20)`: mean and standard deviation of MFCCs and of their differences."""
    extractor = ASiTFeatureExtractor(num_mel_bins=40, mean=0.0, std=0.5)  # the log-mel itself
    rows = []
    for item in tqdm(clips, desc="MFCC", unit="clip"):
        log_mel = extractor(item["waveform"], sampling_rate=16000, return_attention_mask=False)["input_values"][0]
        coefficients = dct(np.asarray(log_mel), norm="ortho", axis=-1)[:, :NUM_COEFFICIENTS]
        parts = (coefficients, np.diff(coefficients, axis=0))
        rows.append(np.concatenate([statistic(part, axis=0) for part in parts for statistic in (np.mean, np.std)]))
    return np.stack(rows)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = probe.parse_args(["--random_init", *(sys.argv[1:] if arguments is None else arguments)])
    if args.shots:
        raise ValueError("--shots has no effect here: run_linear_probe.py has it")
    reading = DatasetArguments.of(args)
    train = reading.load(args.train, args.train_filter or (), split=args.train_split)
    like = {"names": label_names(train), "problem_type": problem_type_of(train)}
    test = reading.load(args.test or args.train, args.test_filter or (), split=args.test_split, **like)
    train_x, test_x = (mfcc_statistics(LabelledClips(dataset, 16000)) for dataset in (train, test))
    train_y, test_y = targets(train), targets(test)
    scores: dict[str, list[float]] = {"random_forest": [], "logistic_regression": []}
    for seed in args.seeds:
        forest = RandomForestClassifier(TREES, random_state=seed, n_jobs=-1).fit(train_x, train_y)
        scores["random_forest"].append(forest.score(test_x, test_y))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train_x, train_y)
    scores["logistic_regression"].append(regression.score(test_x, test_y))
    results = {name: {"mean": float(np.mean(values)), "std": float(np.std(values))} for name, values in scores.items()}
    for name, result in results.items():
        print(f"{name:20} accuracy {result['mean']:.4f} +- {result['std']:.4f}")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    run_script(main)
