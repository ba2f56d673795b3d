#!/usr/bin/env bash
# The method end to end on two CPU cores, with no download but the packages. A ViT teacher learns Fashion-MNIST. A ViT
# half as wide gets its selected weights, and learns scikit-learn's digits beside one with random init, three seeds each.
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
teacher_model="embed_dim=128 depth=6 num_heads=4 patch_size=8"
student_model="embed_dim=64 depth=6 num_heads=2 patch_size=8"
# the same for all runs, from selected weights and from random init
recipe="--model vit_tiny --input_size 32 --batch_size 64 --warmup_epochs 2 --lr 1e-3 --mixup 0 --cutmix 0 --aa none
        --color_jitter 0 --hflip 0 --reprob 0 --device cpu --num_workers 0 --save_ckpt_num 1 --log_freq 1000 --progress false"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

say() { printf '[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }

# train_student NAME OPTION...: train on the digits, with messages in a file beside the run's folder and one line here.
# Call it in a subshell: when that is killed, it kills the run.
train_student() {
    local name=$1 messages=$out/students/$1.txt run
    shift
    # shellcheck disable=SC2086  # the options are words
    "$python" main.py $recipe --model_kwargs $student_model --data_set digits --epochs 15 "$@" \
        --output_dir "$out/students/$name" >"$messages" 2>&1 &
    run=$!
    # shellcheck disable=SC2064  # the number as it is now
    trap "kill $run 2>/dev/null; exit 1" TERM
    if ! wait $run; then
        echo "$name failed; $messages ends with:" >&2
        tail -n 5 "$messages" >&2
        return 1
    fi
    say "  student $name is done"
}

unpack() {
    local folder=$out/data/FashionMNIST/raw packed file
    mkdir -p "$folder" $out/students
    for packed in demo/data/FashionMNIST/raw/*.gz; do
        file=$folder/$(basename "$packed" .gz)
        [ -f "$file" ] || { gzip -dc "$packed" >"$file.tmp" && mv "$file.tmp" "$file"; }
    done
}

say "Unpacking 12,000 training and 2,000 test images of Fashion-MNIST"
unpack

say "Training a teacher, 128 wide, for $teacher_epochs epochs of Fashion-MNIST"
# shellcheck disable=SC2086
"$python" main.py $recipe --model_kwargs $teacher_model --data_set fashion_mnist --data_path $out/data \
    --epochs $teacher_epochs --num_workers 1 --output_dir $out/teacher

say "Selecting the weights of a student, 64 wide, from the teacher"
# shellcheck disable=SC2086
"$python" weight_selection.py --output_dir $out/init \
    --student_model vit_tiny --student_kwargs img_size=32 num_classes=10 $student_model \
    --pretrained_model vit_tiny --pretrained_kwargs img_size=32 num_classes=10 $teacher_model \
    --pretrained_path $out/teacher/checkpoint-$((teacher_epochs - 1)).pth

say "Training 6 students on the digits, two at a time: from the selected weights and from random ones, otherwise the same"
export OMP_NUM_THREADS=1 # a model this small gains little from a second thread; the other student takes the second core
for seed in 0 1 2; do
    train_student selected-$seed --seed $seed --initialize $out/init/vit.pth &
    train_student random-$seed --seed $seed &
    wait -n # one command per line, or a failure would go unnoticed
    wait -n
done

say "Comparing the two kinds of students"
"$python" compare.py $out/students --plot $out/curves.png --markdown $out/table.md
say "Done: $out/table.md has this table, $out/curves.png the curves"
