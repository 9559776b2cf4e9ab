#!/usr/bin/env bash
# The commands that made this folder with an earlier version of the scripts, from the root of the repository: about four hours on two CPU cores, a core a pair.
# Finished runs are not repeated, so that it can be interrupted. DINOv2-S needs its weights: a folder, or the network.
set -euo pipefail
export OMP_NUM_THREADS=1
DINOV2=${DINOV2:-facebook/dinov2-small}

python examples/fashion_mnist.py --destination outputs/data/fashion.parquet
for shift in inverted noise; do
    python examples/fashion_mnist.py --shift $shift --destination outputs/data/fashion_$shift.parquet
done

compare() { # name, then arguments
    python examples/compare_components.py --output_dir "outputs/compare/$1" --max_train_samples 640 "${@:2}"
}
demo=(--num_train_epochs 3 --learning_rates 3e-3 1e-2 3e-2 --full_learning_rates 1e-3 3e-3 1e-2 3e-2)
dinov2=(--model_name_or_path "$DINOV2" --image_size 28 --max_steps 60 --per_device_train_batch_size 16
        --learning_rates 2e-4 1e-3 5e-3 --full_learning_rates 5e-5 2e-4 1e-3 5e-3)
fashion=(--test_fraction 0.3 --dataset_name)

compare demo-digits "${demo[@]}" --groups kind default stock
compare demo-digits "${demo[@]}" --groups blocks --seeds 0 1
compare demo-inverted "${demo[@]}" "${fashion[@]}" outputs/data/fashion_inverted.parquet --groups kind default stock
compare demo-noise "${demo[@]}" "${fashion[@]}" outputs/data/fashion_noise.parquet --groups kind default
compare dinov2-digits "${dinov2[@]}" --groups kind default stock
compare dinov2-digits "${dinov2[@]}" --groups blocks --seeds 0 1 --learning_rates 1e-3 5e-3
compare dinov2-fashion "${dinov2[@]}" "${fashion[@]}" outputs/data/fashion.parquet --groups kind default stock
# The head and the norms want larger steps than matrices do: one more rate for them.
compare dinov2-digits "${dinov2[@]}" --groups kind --full_learning_rates 2e-2 --methods "head only" LN1 LN2
compare dinov2-fashion "${dinov2[@]}" "${fashion[@]}" outputs/data/fashion.parquet \
    --groups kind --full_learning_rates 2e-2 --methods "head only" LN1 LN2

python examples/summarize.py --folders outputs/compare/* --destination examples/results
