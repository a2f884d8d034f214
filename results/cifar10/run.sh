#!/usr/bin/env bash
# CIFAR-10 from its parquet files to figures. The same command goes on where it was stopped, over as many days as it takes:
#     results/cifar10/run.sh IMAGES VAE     # a folder with train.parquet, and that of a diffusers AutoencoderKL
set -euo pipefail
images=${1:?the folder with train.parquet} vae=${2:?the folder of a diffusers AutoencoderKL}

sddit prepare "$images/train.parquet" --out data/cifar10
sddit prepare "$images/train.parquet" --out data/cifar10-latents --vae "$vae"
for seeds in 1 2 3; do # one seed of all systems comes before the second of any
    python sweeps/convergence.py --preset cifar10-latents --set 'lr=["x1"]' --seeds "$seeds"
done
for seeds in 1 2 3; do
    python sweeps/mask_ratio.py --preset cifar10-latents --set eval.every=2000 --seeds "$seeds"
done
