#!/usr/bin/env bash
# run.sh [RUN]: opens the project as a person would, in JupyterLab and Chromium, and leaves screenshots in outputs/browser/.
# RUN is the folder of a finished run, outputs/demo if none is named.
# Needs node and npm; Chromium is installed if it is missing, as root on Debian.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v chromium > /dev/null; then
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends chromium > /dev/null
fi
npm ci --prefix tests/browser --silent
node tests/browser/look.js "${1:-outputs/demo}"
