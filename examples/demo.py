"""
Pretrain without labels, probe, finetune and predict in a fresh process, at a small scale.

    python examples/demo.py --output_dir demo_output              # on generated sounds
    python examples/demo.py --output_dir demo_output --audio DIR  # on your own folder of class folders

Each step runs one of the example scripts and prints its command. A quarter of the files is held out; if a csv file in
DIR has a column with the speaker or source of each file, whole speakers or sources are held out. At the end the demo
prints a table of accuracies and the paths of its pictures.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from demo_sounds import write_sounds

from asit_hf.data import LabelledClips, find_audio_files, load_audio_dataset, read_audio, split_dataset
from asit_hf.evaluation.embeddings import embed
from asit_hf.hub.export import export_model
from asit_hf.loading import load_encoder, load_feature_extractor
from asit_hf.plotting import plot_confusion, plot_embeddings, plot_log_mel
from asit_hf.utils.arguments import run_script
from asit_hf.utils.names import local_path, path_text

EXAMPLES = Path(__file__).parent
GROUP_COLUMNS = ("speaker", "speaker_id", "src_file", "source")

# A small encoder, short crops and small batches, to finish within minutes on a CPU. Real runs take hours.
PRETRAINING = {
    "size": "tiny",
    "config_overrides": "num_hidden_layers=4,num_prototypes=256,distillation_hidden_size=256",
    "drop_path_rate": 0.0,
    "global_seconds": 0.66,
    "num_local_crops": 0,
    "per_device_train_batch_size": 16,
    "max_steps": 500,
    "learning_rate": 1e-3,
    "warmup_epochs": 1,
    "teacher_momentum": 0.98,
    "weight_decay_end": 0.1,
    "logging_steps": 20,
    "plot_steps": 200,
    "save_strategy": "no",
    "report_to": "none",
}
FINETUNING = {
    "pooling_mode": "cls_mean",
    "validation_fraction": 0.15,
    "max_seconds": 1.0,
    "max_eval_seconds": 10.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "max_steps": 150,
    "learning_rate": 5e-4,
    "warmup_steps": 15,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 75,
    "save_strategy": "steps",
    "save_steps": 75,
    "save_total_limit": 1,
    "report_to": "none",
}


def run(script: str, *flags: str, **options) -> None:
    """Prints the command of an example script and runs it."""
    arguments = [*flags]
    for name, value in options.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    print("\n$ python " + shlex.join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def write_split(audio: Path, output_dir: Path) -> tuple[Path, Path, bool]:
    """Splits class folders into train.csv and test.csv (file, label, group); returns both and whether groups exist."""
    dataset = load_audio_dataset(audio, labels_from_folders=True)
    table = find_groups(audio)
    files = [Path(local_path(row["path"])) for row in dataset["audio"]]
    groups = [table.get(path.relative_to(audio).as_posix(), table.get(path.name)) for path in files]
    if any(groups) and not all(groups):
        print(f"{groups.count(None)} of {len(groups)} files have no speaker or source in a csv: splitting by file")
    has_groups = all(groups)
    if has_groups:
        dataset = dataset.add_column("group", groups)
    train, test = split_dataset(dataset, test_fraction=0.25, seed=0, group_column="group" if has_groups else "")
    names = dataset.features["label"].names
    manifests = []
    for name, part in (("train", train), ("test", test)):
        columns = {
            "file": [path_text(Path(local_path(row["path"])).resolve()) for row in part["audio"]],
            "label": [names[label] for label in part["label"]],
        }
        if has_groups:
            columns["group"] = part["group"]
        manifests.append(output_dir / f"{name}.csv")
        with manifests[-1].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values()))
    return *manifests, has_groups


def find_groups(audio: Path) -> dict[str, str]:
    """Speaker or source by file, from the csv files beside the class folders; empty if there is none."""
    groups: dict[str, str] = {}
    for table in sorted(audio.glob("*.csv")):
        with table.open(newline="") as file:
            reader = csv.DictReader(file)
            column = next((name for name in GROUP_COLUMNS if name in (reader.fieldnames or ())), None)
            key = next((name for name in ("file", "path", "filename") if name in (reader.fieldnames or ())), None)
            if column and key:
                groups.update((row[key], row[column]) for row in reader)
    return groups


def predict_in_a_fresh_process(classifier: Path, files: list[Path]) -> list[dict]:
    """Label and score of each file, from a `pipeline` that a new Python process loads from the saved folder."""
    code = (
        "import json, sys, asit_hf\n"
        "from transformers import pipeline\n"
        "classifier = pipeline('audio-classification', model=sys.argv[1])\n"
        "print(json.dumps([classifier(file, top_k=1)[0] for file in sys.argv[2:]]))"
    )
    print("\n$ python -c \"... pipeline('audio-classification', model=...)\" " + str(classifier), flush=True)
    command = [sys.executable, "-c", code, str(classifier), *map(str, files)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def draw_pictures(output_dir: Path, encoder: Path, test: Path, predictions: Path) -> list[Path]:
    """Draws a log-mel spectrogram, the embeddings and the confusion matrix; returns the paths of all pictures."""
    pictures = output_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    dataset = load_audio_dataset(test)
    names = dataset.features["label"].names
    extractor = load_feature_extractor(encoder)
    rate = extractor.sampling_rate
    clip = read_audio(dataset[0]["audio"], rate, duration=6.0)
    spectrogram = extractor(clip, sampling_rate=rate, return_tensors="pt")["input_values"][0]
    plot_log_mel(spectrogram, names[dataset[0]["label"]]).savefig(pictures / "log-mel.png", dpi=110)
    embeddings = embed(
        load_encoder(encoder),
        extractor,
        LabelledClips(dataset, rate, max_seconds=10.0),
        pooling="cls_mean",
        progress=False,
    )
    plot_embeddings(embeddings, dataset["label"][:], names).savefig(pictures / "embeddings.png", dpi=110)
    with predictions.open(newline="") as file:
        pairs = [(row["label"], row["prediction"]) for row in csv.DictReader(file)]
    matrix = np.zeros((len(names), len(names)))
    for label, prediction in pairs:
        matrix[names.index(label), names.index(prediction)] += 1
    plot_confusion(matrix, names).savefig(pictures / "confusion.png", dpi=110)
    return sorted(pictures.glob("*.png")) + sorted((output_dir / "pretraining" / "pictures").glob("*.png"))


def print_table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"| {name:<{width}} | {value:>16} |" for name, value in rows)
    print(table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="folder for all results")
    parser.add_argument("--audio", type=Path, help="folder of class folders (default: generated sounds)")
    parser.add_argument(
        "--max_steps",
        type=int,
        default=PRETRAINING["max_steps"],
        help=f"pretraining steps (default: {PRETRAINING['max_steps']})",
    )
    args = parser.parse_args()
    start = time.time()
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)

    audio = (args.audio or write_sounds(output_dir / "sounds")).resolve()
    if not find_audio_files(audio):
        raise SystemExit(f"error: expected audio files in class folders below {audio}, got none")
    train, test, has_groups = write_split(audio, output_dir)
    groups = {"group_column": "group"} if has_groups else {}

    pretraining, encoder, classifier = (output_dir / name for name in ("pretraining", "encoder", "classifier"))
    run("run_pretraining.py", train_data=train, output_dir=pretraining, **{**PRETRAINING, "max_steps": args.max_steps})
    export_model(pretraining, encoder, overwrite=True)
    probe = {
        "train": train,
        "test": test,
        "pooling": "cls_mean",
        "max_seconds": 10.0,
        "model_name_or_path": encoder,
        "seeds": [0, 1, 2],
        **groups,
    }
    run("run_linear_probe.py", "--random_init", **probe, output=output_dir / "probe-random.json")
    run("run_linear_probe.py", **probe, output=output_dir / "probe-pretrained.json")
    run(
        "run_audio_classification.py",
        model_name_or_path=encoder,
        train_data=train,
        eval_data=test,
        output_dir=classifier,
        **groups,
        **FINETUNING,
    )

    dataset = load_audio_dataset(test)
    names = dataset.features["label"].names
    chosen = [dataset[int(index)] for index in np.linspace(0, len(dataset) - 1, 8)]
    predicted = predict_in_a_fresh_process(classifier, [row["audio"]["path"] for row in chosen])

    results = {name: json.loads((output_dir / f"probe-{name}.json").read_text()) for name in ("random", "pretrained")}
    finetuned = json.loads((classifier / "eval_results.json").read_text())

    def percent(name: str, probe: str) -> str:
        value = results[name]["summary"][probe]["accuracy"]
        return f"{100 * value['mean']:.1f} +- {100 * value['std']:.1f} %"

    num_train = results["random"]["train_clips"]
    split_by = "speaker or source" if has_groups else "file"
    print(f"\n{len(names)} classes, {num_train} training and {len(dataset)} held-out clips, split by {split_by}")
    table = print_table(
        [
            ("accuracy on held-out clips", ""),
            ("chance", f"{100 / len(names):.1f} %"),
            ("random initialization, linear probe", percent("random", "linear")),
            ("pretrained, linear probe", percent("pretrained", "linear")),
            ("random initialization, kNN", percent("random", "knn")),
            ("pretrained, kNN", percent("pretrained", "knn")),
            ("pretrained, finetuned", f"{100 * finetuned['eval_accuracy']:.1f} %"),
        ]
    )
    (output_dir / "table.md").write_text(table + "\n")
    print("\npredictions of the saved classifier in a fresh process:")
    for row, best in zip(chosen, predicted):
        print(
            f"  {Path(row['audio']['path']).name}: {best['label']} ({best['score']:.2f}), label {names[row['label']]}"
        )
    print("\npictures:")
    for picture in draw_pictures(output_dir, encoder, test, classifier / "predictions.csv"):
        print(f"  {picture}")
    print(f"\nclassifier: {classifier}\ntotal time: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
