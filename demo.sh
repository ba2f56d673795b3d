#!/usr/bin/env bash
# The method end to end on two CPU cores, with no download but the packages. A ViT teacher learns Fashion-MNIST. ViTs half
# as wide then learn scikit-learn's digits, three seeds each, in three ways: from random init; from the teacher's selected
# weights; and by the whole chain: the teacher learns the digits too, is cut with a refit, and teaches the student so made.
#
#     ./demo.sh            results in demo_output/: table.md, curves.png, one folder a run
#
# A second call keeps what is finished and resumes what was interrupted. Remove demo_output/ to start over.
# PYTHON names the interpreter that makes .venv (default: python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_venv.sh

SECONDS=0 # bash counts from here, so that the times below leave out the installation
out=demo_output
teacher_epochs=6
pretrained=$out/teacher/checkpoint-$((teacher_epochs - 1)).pth
teacher_model="embed_dim=128 depth=6 num_heads=4 patch_size=8"
student_model="embed_dim=64 depth=6 num_heads=2 patch_size=8"
# the same for all runs, whatever they start from
recipe="--model vit_tiny --input_size 32 --batch_size 64 --warmup_epochs 2 --lr 1e-3 --mixup 0 --cutmix 0 --aa none
        --color_jitter 0 --hflip 0 --reprob 0 --device cpu --num_workers 0 --save_ckpt_num 1 --log_freq 1000 --progress false"
export OMP_NUM_THREADS=1 # models this small gain little from a second thread; another run takes the second core
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

say() { printf '[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }

# quietly NAME COMMAND...: run a command with its messages in a file, and one line here.
# Call it in a subshell: when that is killed, it kills the command.
quietly() {
    local name=$1 messages=$out/$1.txt run
    shift
    "$@" >"$messages" 2>&1 &
    run=$!
    # shellcheck disable=SC2064  # the number as it is now
    trap "kill $run 2>/dev/null; exit 1" TERM
    if ! wait $run; then
        echo "$name failed; $messages ends with:" >&2
        tail -n 5 "$messages" >&2
        return 1
    fi
    say "  $name is done"
}

unpack() {
    local folder=$out/data/FashionMNIST/raw packed file
    mkdir -p "$folder" $out/students
    for packed in demo/data/FashionMNIST/raw/*.gz; do
        file=$folder/$(basename "$packed" .gz)
        [ -f "$file" ] || { gzip -dc "$packed" >"$file.tmp" && mv "$file.tmp" "$file"; }
    done
}

# cut NAME CHECKPOINT OPTION...: write init/NAME.pth, a student's weights from those of a teacher
cut() {
    # shellcheck disable=SC2086  # the options are words
    quietly "$1" "$python" weight_selection.py --output_dir "$out/init/$1.pth" \
        --student_model vit_tiny --student_kwargs img_size=32 num_classes=10 $student_model \
        --pretrained_model vit_tiny --pretrained_kwargs img_size=32 num_classes=10 $teacher_model \
        --pretrained_path "$2" "${@:3}"
}

# learn_digits NAME MODEL OPTION...
learn_digits() {
    # shellcheck disable=SC2086
    quietly "$1" "$python" main.py $recipe --data_set digits --output_dir "$out/$1" --epochs 15 --model_kwargs $2 "${@:3}"
}

train_random() {
    for seed; do
        learn_digits students/random-$seed "$student_model" --seed $seed
    done
}

train_selected() {
    for seed; do
        learn_digits students/selected-$seed "$student_model" --seed $seed --initialize $out/init/selected.pth
    done
}

train_chain() {
    for seed; do
        learn_digits students/chain-$seed "$student_model" --seed $seed --initialize $out/init/refitted.pth \
            --distillation logits --teacher_path $out/tuned
    done
}

tune_and_refit() {
    learn_digits tuned "$teacher_model" --initialize $pretrained
    cut refitted $out/tuned/checkpoint-best.pth --refit true --include_head true --data_set digits --data_path $out
}

# side_by_side FUNCTION-WITH-ARGUMENTS FUNCTION-WITH-ARGUMENTS: run both, one on each core
side_by_side() {
    $1 &
    $2 &
    wait -n # one command per line, or a failure would go unnoticed
    wait -n
}

say "Unpacking 12,000 training and 2,000 test images of Fashion-MNIST"
unpack

say "Training a teacher, 128 wide, for $teacher_epochs epochs of Fashion-MNIST; beside it, students from random init, 64 wide"
train_random 0 1 2 &
# Two threads for the epochs in which the students are done. They must not wait actively: the other core is taken at first.
# shellcheck disable=SC2086
OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE "$python" main.py $recipe --model_kwargs $teacher_model \
    --data_set fashion_mnist --data_path $out/data --epochs $teacher_epochs --num_workers 1 --output_dir $out/teacher
wait $! # a wait without the number would not notice that a student failed

say "Selecting weights from the teacher"
cut selected $pretrained &
wait $!

say "Students from the selected weights; beside them, the chain: fine-tuning the teacher, cutting it, distilling it"
side_by_side "tune_and_refit" "train_selected 0 1"
side_by_side "train_chain 0" "train_selected 2"
side_by_side "train_chain 1" "train_chain 2"

say "Comparing the three kinds of students"
# without the teacher's sha256 among the settings: that a run is distilled says enough; with a named baseline, because the
# chain is not trained as random init is
"$python" compare.py $out/students --ignore teacher --baseline $out/students/random-0 \
    --plot $out/curves.png --markdown $out/table.md
say "Done: $out/table.md has this table, $out/curves.png the curves"
