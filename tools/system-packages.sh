#!/bin/sh
# Install the system packages that the tests use, or with `bench` those that the benchmarks compare with, where that
# is ours to do: as root on Debian or Ubuntu. Elsewhere nothing happens: a test that misses a program is skipped with
# its name, and a benchmark names the peer that is missing. What guests are made of is fetched beside the system.
set -eu

# A program of each package, and the package. Only what is missing is installed.
packages='
    mke2fs              e2fsprogs
    qemu-img            qemu-utils
    qemu-system-x86_64  qemu-system-x86
    nbdinfo             libnbd-bin
    fio                 fio
    openssl             openssl
    mkfs.xfs            xfsprogs
    mkfs.btrfs          btrfs-progs
    unshare             util-linux
    mount               mount
'
[ "${1:-test}" != bench ] || packages='
    mke2fs      e2fsprogs
    borg        borgbackup
    restic      restic
    qemu-nbd    qemu-utils
    nbdkit      nbdkit
    nbdcopy     libnbd-bin
    fio         fio
    qemu-system-x86_64  qemu-system-x86
'

[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

PATH=$PATH:/usr/sbin:/sbin
missing=$(echo "$packages" | while read -r program package; do
    [ -z "$program" ] || command -v "$program" >/dev/null || echo "$package"
done)
if [ -n "$missing" ]; then
    echo "system-packages: installing" $missing
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # one word a package
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; } ||
        echo "system-packages: that failed; what needs them will say so" >&2
fi
sh "$(dirname "$0")/fetch-guest.sh"
