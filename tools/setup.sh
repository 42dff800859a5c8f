#!/usr/bin/env bash
# Makes the virtual environment $1 from the locked requirements, and installs Debian packages that are missing.
# Runs again in seconds: uv links the wheels from its cache.
set -euo pipefail
venv=${1:?folder of the virtual environment}
cd "$(dirname "$0")/.."

say() { printf '\033[1msetup:\033[0m %s\n' "$*"; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { say "Python 3.11 or newer is needed; $python is $("$python" -V). Set PYTHON=/path/to/python3.11."; exit 1; }

# The local cluster needs these on the machine itself, one test strace, and the digest's kernel a compiler; everything else comes from
# Python or from Go modules.
declare -A package=([containerd]=containerd [runc]=runc [nft]=nftables [ip]=iproute2 [git]=git [strace]=strace [cc]=gcc)
missing=()
for command in "${!package[@]}"; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=("${package[$command]}")
done
[ -e /usr/include/stdint.h ] || missing+=(libc6-dev)
[ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || missing+=(containernetworking-plugins)
if [ ${#missing[@]} -gt 0 ]; then
  if command -v apt-get >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    say "installing the Debian packages that are missing: ${missing[*]}"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  else
    say "please install: ${missing[*]} (Debian's names; containerd >= 1.6, runc >= 1.1, CNI plugins in /opt/cni/bin)"
    exit 1
  fi
fi

[ -x "$venv/bin/python" ] || { say "making $venv with $("$python" -V)"; "$python" -m venv "$venv"; }
"$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
say "installing the locked requirements (torch is 5 GB on the first run, links from uv's cache after that)"
# Bytecode is compiled here because pods see this environment read-only, and it halves every import of torch.
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --require-hashes --compile-bytecode -r requirements/dev.txt
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --no-build-isolation --compile-bytecode -e .
# Where pods of the local cluster find this checkout (`stormjib_local.images.MOUNTS`); elsewhere the folder is not there.
printf '/opt/mounts/0/%s\n' operator checkpoint health trainer_image local \
  > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/stormjib_in_pods.pth"
"$venv/bin/python" -m compileall -q operator checkpoint health trainer_image local
say "ready: $venv"
