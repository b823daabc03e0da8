#!/usr/bin/env bash
# gcsfuse on a TPU machine (Ubuntu), from its own package archive.
set -euo pipefail
release="gcsfuse-$(lsb_release -c -s)"
key=/usr/share/keyrings/cloud.google.gpg
curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo gpg --yes --dearmor -o "$key"
echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
sudo apt-get update -q
sudo apt-get install -q -y gcsfuse
