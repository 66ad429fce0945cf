#!/usr/bin/env python3
"""What PyTorch's own f32 and bf16 runs show against the float64 goldens: the yardstick for ours.

goldens.py [FOLDER...]; the default is every folder of tests/fixtures/goldens."""
import pathlib
import sys

import numpy as np
import torch

from pytorch_train import Run, load, read_safetensors


def error(a, b):
    """||a - b|| / ||b|| in f64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compare(folder, precision):
    reference = read_safetensors(folder / "reference.safetensors")
    batch = [torch.from_numpy(np.array(reference[n])) for n in ("input_ids", "targets")]
    run = Run(load(folder, precision == "f64"), lambda n: 1e-3, precision=precision)
    losses, norms, worst = [], [], {}
    for i in range(3):
        losses.append(run.gradient(*batch))
        if i == 0:
            worst["gradient"] = max((error(p.grad, reference["grad." + n]), n) for n, p in run.model.named_parameters())
        norms.append(run.update())
    worst["weights"] = max((error(w, reference["after3." + n]), n) for n, w in run.model.arrays().items())
    print(f"{folder.name:5} {precision:4}  loss {error(losses[0], reference['loss'][0]):.1e}"
          f"  step losses {error(losses, reference['step_losses']):.1e}  gradient norm {error(norms[0], reference['grad_norm'][0]):.1e}"
          f"  worst gradient {worst['gradient'][0]:.4g} ({worst['gradient'][1]})"
          f"  worst weights after three steps {worst['weights'][0]:.4g} ({worst['weights'][1]})")


def main():
    here = pathlib.Path(__file__).resolve().parents[2] / "tests/fixtures/goldens"
    for folder in map(pathlib.Path, sys.argv[1:] or sorted(here.iterdir())):
        for precision in ("f64", "f32", "bf16"):
            compare(folder, precision)


if __name__ == "__main__":
    main()
