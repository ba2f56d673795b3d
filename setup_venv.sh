# demo.sh and test.sh source this from the repository's root. It makes .venv if it is missing, installs the two
# requirement files if they have changed, and sets $python to the environment's interpreter.
# PYTHON names the interpreter that makes the environment (default: python3); it must be 3.11 or newer.

setup_venv() {
    local base=${PYTHON:-python3} stamp wanted
    python=$PWD/.venv/bin/python
    if [ ! -x "$python" ] || ! "$python" -c '' 2>/dev/null; then
        command -v "$base" >/dev/null || { echo "$base: not found; set PYTHON to a Python of 3.11 or newer" >&2; return 1; }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "$base is $("$base" -V 2>&1); set PYTHON to a Python of 3.11 or newer" >&2
            return 1
        }
        echo "Making the virtual environment .venv with $("$base" -V 2>&1)"
        # --clear: remove what an interrupted call or a removed interpreter left there
        "$base" -m venv --clear .venv || {
            echo "could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        }
    fi
    stamp=.venv/requirements-installed
    wanted=$(cat requirements.txt requirements-dev.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing requirements.txt and requirements-dev.txt into .venv (once, a few minutes)"
        "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt || return 1
        echo "$wanted" >"$stamp"
    fi
}

setup_venv
