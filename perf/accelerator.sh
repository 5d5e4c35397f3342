#!/usr/bin/env bash
# First minutes on a new accelerator: conformance, rates, toy runs, tests and a profile, as JSON. See --help.
# PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m perf.accelerator "$@"
