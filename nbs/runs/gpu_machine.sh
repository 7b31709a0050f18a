#!/usr/bin/env bash
# gpu_machine.sh OUT MINUTES COMMAND [OPTIONS]: a command of salt on a machine without network, for at most so long:
#     nbs/runs/gpu_machine.sh results 9 run modern_gpu --until train
# Call it in the project's folder, with .gpu-pack/ as `make gpu-pack` left it, as often as it takes. OUT gets all of outputs/
# but the predictions, which any machine makes anew from the weights, in files of at most 16 MB. To go on elsewhere with
# what they hold:  cat OUT/outputs.tar.* | tar --extract
# Not for all rounds of a run with pseudo-labels: see nbs/other_machines.md, "A GPU without network".
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
out=$1 minutes=$2
shift 2
python=${PYTHON:-python3}
packages=$PWD/.gpu-pack/site

if [ ! -e "$packages/.installed" ] || [ -n "$(find .gpu-pack -maxdepth 1 -name '*.whl' -newer "$packages/.installed")" ]; then
    rm -rf "$packages"
    "$python" -m pip install --quiet --no-index --no-deps --target "$packages" .gpu-pack/*.whl
    touch "$packages/.installed"
fi
for tiles in train test; do # for trainings alone, the pieces of the train tiles are enough
    [ -e "data/.$tiles" ] || [ ! -e ".gpu-pack/$tiles.tar.00" ] || { cat ".gpu-pack/$tiles.tar".* | tar --extract --directory data && touch "data/.$tiles"; }
done
export PYTHONPATH=$PWD:$packages JUPYTER_PATH=$packages/share/jupyter
export PYTHONWARNINGS="ignore:IProgress not found" # tqdm would like widgets, which nobody looks at there

status=0
timeout --signal=INT "${minutes}m" "$python" "$packages/bin/salt" "$@" || status=$?
[ "$status" != 124 ] || echo "The time is up: the next call goes on after the last finished epoch."

mkdir -p "$out" outputs
rm -f "$out"/outputs.tar.*
tar --create --exclude=predictions.zarr --exclude=.snakemake outputs | split --bytes 16M --numeric-suffixes --suffix-length 3 - "$out/outputs.tar."
exit "$status"
