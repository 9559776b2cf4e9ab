#!/usr/bin/env bash
# The commands that make the comparisons of this folder, from the root of the repository. A finished method is not
# repeated, so that it can be interrupted. Most runs in this folder are what 18 processes on one H100 finished in 500
# seconds, 15 processes in 770 and nine in 800 seconds of later sessions, most important methods first (--methods). On one CPU core a
# method takes five minutes or more. Made on a CPU:
# - LoRA on all linear layers with r=8 (but for ViT-Ti on CIFAR-10 and DINOv2-S on Fashion-MNIST);
# - of the demo's model: LoRA with r=2 (but for low contrast), on KappaTune's layers, on MHA of the digits and noisy images,
#   and on FC1 and FC2; FC1 with FC2 (but for low contrast);
# - LoRA on MHA of ViT-Ti on Fashion-MNIST; EVA of DINOv2-S on CIFAR-10;
# - MHA with FC1 of the first half, of the demo's model and ViT-Ti;
# - LN1 and LN2 of ViT-Ti and DINOv2-S, but for LN1 of DINOv2-S on CIFAR-10;
# - components that are trained at the recommended rates alone: all those of the demo's model; of ViT-Ti, a sixth and a
#   half of the weights by three rankings, and seven sets on CIFAR-10.
# Some of them had --matmul_precision medium, which multiplies in bfloat16 on a CPU with AMX: LoRA with r=8, and EVA, of
# DINOv2-S on CIFAR-10; LN1, LN2 and LoRA on MHA of ViT-Ti and DINOv2-S (but not what ran on the H100); LoRA on FC1 and FC2 of
# the digits, the inverted images and (FC2 only) those of low contrast; and the components in the last line of the list. With
# it, three seeds of MHA in full of ViT-Ti on Fashion-MNIST at the recommended rates had 85.9 %, and 86.1 % on the H100.
set -euo pipefail
DINOV2=${DINOV2:-facebook/dinov2-small}
VIT=${VIT:-WinKawaks/vit-tiny-patch16-224}
CIFAR10=${CIFAR10:-uoft-cs/cifar10}  # a folder, or a dataset of the Hub with its columns renamed to image and label

python examples/fashion_mnist.py --samples 4000 --destination outputs/data/fashion.parquet
for shift in inverted noise low_contrast; do
    python examples/fashion_mnist.py --samples 4000 --shift $shift --destination outputs/data/fashion_$shift.parquet
done

compare() { # name, then arguments
    python examples/compare_components.py --steps 300 --evaluations 4 --output_dir "outputs/compare/$1" "${@:2}"
}
thirds() { # name, then arguments
    compare "$@" --groups components --shares 0.3333333333333333 --max_rates 1 --stages train
}
sixths_and_halves() { # name, then arguments
    compare "$@" --groups components --shares 0.16666666666666666 0.5 --max_rates 1 --stages train
}
with_the_model_of_the_demo() { # one of these
    "$1" demo-digits --test_fraction 0.5 --seeds 5
    for shift in inverted noise low_contrast; do
        "$1" "demo-$shift" --dataset_name outputs/data/fashion_$shift.parquet --test_fraction 0.5 \
            --max_train_samples 640 --seeds 5
    done
}
on_both_data_sets() { # one of these, its name for the model, the model, its image size
    "$1" "$2-fashion" --model_name_or_path "$3" --image_size "$4" --dataset_name outputs/data/fashion.parquet \
        --test_fraction 0.5 --max_train_samples 1000
    "$1" "$2-cifar10" --model_name_or_path "$3" --image_size "$4" --dataset_name "$CIFAR10" \
        --test_fraction 0.5 --max_train_samples 1000
}
with_vit() { on_both_data_sets "$1" vit "$VIT" 96; }
with_dinov2() { on_both_data_sets "$1" dinov2 "$DINOV2" 84; }
on_all_pairs() { # one of these
    with_the_model_of_the_demo "$1"
    with_vit "$1"
    with_dinov2 "$1"
}
on_all_pairs compare
# Components that each criterion ranks first, a third of the weights, at the recommended rates alone: the same folders.
on_all_pairs thirds
# A sixth and a half of the weights.
on_all_pairs sixths_and_halves

# The runs of budgets.jsonl: at the recommended rates, on a CPU.
within() { # name, then arguments
    python examples/compare_components.py --steps 300 --evaluations 4 --test_fraction 0.5 --seeds 3 --max_rates 1 \
        --groups budgets --stages train --output_dir "outputs/budgets/$1" "${@:2}"
}
within_two() { within "$@" --budgets "0.6 time" "0.5 memory"; }
with_the_model_of_the_demo within_two
with_vit within_two
with_dinov2 within_two
# Larger budgets: other folders, because a folder keeps what was found in it.
within larger-digits --budgets "0.7 time" "0.9 time"
within larger-low_contrast --budgets "0.7 time" "0.9 time" --max_train_samples 640 \
    --dataset_name outputs/data/fashion_low_contrast.parquet
for shift in inverted noise; do
    within "larger-$shift" --budgets "0.9 time" --max_train_samples 640 --dataset_name outputs/data/fashion_$shift.parquet
done
# The sets "by kernels" are those that `forecast_finetuning(budget=..., pilot=False)` finds.

# Larger images, in larger/: 12 methods, on the H100 beside the runs above; the forecast on a CPU.
python examples/compare_components.py --steps 300 --evaluations 4 --model_name_or_path "$VIT" --image_size 224 \
    --dataset_name "$CIFAR10" --test_fraction 0.5 --max_train_samples 1000 --stacked 3 --criteria parameter_plasticity \
    --groups kinds depth stock --stages train forecast --output_dir outputs/larger/vit-cifar10 \
    --methods everything MHA "LoRA on all linear layers, r=8" "MHA + FC1" "LN1 + LN2" "attention output" "last 3 blocks" \
    "MHA + FC1 of the first half" FC1 FC2 "last 6 blocks" "LoRA on query and value, r=8"

python examples/summarize.py --folders outputs/compare/* --destination examples/results

# short_runs.jsonl: the recommended rates of short runs, on a CPU.
short() { # name, then arguments
    python examples/benchmarks/rates.py --pair "$1" --steps 60 --seeds 3 --factors 0.25 0.5 1 2 4 \
        --methods MHA everything --test_fraction 0.5 --output outputs/short_runs.jsonl "${@:2}"
}
short demo-digits
for shift in inverted noise low_contrast; do
    short demo-$shift --dataset_name outputs/data/fashion_$shift.parquet --max_train_samples 640
done
# For larger images at fewer rates, with one seed.
python examples/benchmarks/rates.py --pair vit-cifar10-224px --steps 60 --seeds 1 --factors 0.25 1 --methods MHA everything \
    --test_fraction 0.5 --max_train_samples 1000 --model_name_or_path "$VIT" --image_size 224 --dataset_name "$CIFAR10" \
    --output outputs/short_runs.jsonl

# smaller_rates.jsonl: short runs at the recommended rates and at a quarter of them, on a CPU. So for the other pairs too.
smaller() { # name, then arguments
    python examples/benchmarks/smaller_rates.py --pair "$1" --test_fraction 0.5 --output outputs/smaller_rates.jsonl "${@:2}"
}
smaller demo-digits
smaller demo-digits --kinds MHA
smaller vit-cifar10-224px --model_name_or_path "$VIT" --image_size 224 --dataset_name "$CIFAR10" --max_train_samples 1000
