#!/usr/bin/env bash
# A Debian package of this checkout, in dist/. The same checkout makes the same bytes.
#
#   tools/deb.sh    VERSION=x.y.z-n for another version than the program's; DEBFULLNAME and DEBEMAIL say who makes it
#
# For every architecture: BPF has its own, and those that the daemon runs on are little-endian like it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

version=${VERSION:-$(.venv/bin/python -c 'from enforcer import __version__; print(__version__)')-1}
maintainer="${DEBFULLNAME:-registry-enforcer} <${DEBEMAIL:-root@localhost}>"
tree=build/deb
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -c safe.directory='*' log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

rm -rf "$tree"
mkdir -p "$tree/DEBIAN"
DESTDIR=$PWD/$tree PREFIX=/usr tools/install.sh install
gzip -9n "$tree"/usr/share/man/man?/*
documents=$tree/usr/share/doc/registry-enforcer
mkdir -p "$documents"
install -m 644 packaging/debian/copyright docs/audit.md "$documents/"
install -m 644 README.md "$documents/README.md"
install -m 644 CHANGELOG.md "$documents/changelog"
cat >"$documents/changelog.Debian" <<EOF
registry-enforcer ($version) unstable; urgency=medium

  * What changed is in changelog.gz.

 -- $maintainer  $(date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")
EOF
gzip -9n "$documents/changelog" "$documents/changelog.Debian"

(cd "$tree" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum) >"$tree/DEBIAN/md5sums"
echo /etc/registry-enforcer/policy.toml >"$tree/DEBIAN/conffiles"
install -m 755 packaging/debian/{postinst,prerm,postrm} "$tree/DEBIAN/"
size=$(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)
sed -e "s|@version@|$version|" -e "s|@size@|$size|" -e "s|@maintainer@|$maintainer|" packaging/debian/control >"$tree/DEBIAN/control"
mkdir -p dist
dpkg-deb --root-owner-group -Zxz --build "$tree" "dist/registry-enforcer_${version}_all.deb"
