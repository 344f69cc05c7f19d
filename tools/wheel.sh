#!/usr/bin/env bash
# Build the wheel, install it in a fresh environment outside the tree, and run the tests there: what a user gets.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT

.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
wheel=$(ls -t dist/refattn-*.whl | head -n 1)

"${PYTHON:-python3}" -m venv "$away/venv"
"$away/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$root/$wheel[golden,test]"
cp -r tests pyproject.toml "$away/"
cd "$away"
"$away/venv/bin/python" -c 'import pathlib, refattn; print("testing", pathlib.Path(refattn.__file__).parent)'
"$away/venv/bin/python" -m pytest -n auto --dist loadfile
