# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What both packages have in common. Set $top before sourcing this.

: "${top:?}"

# That of the file VERSION. What comes after a release is higher, by the number of
# commits; where they are not all there, as in a shallow clone, it says nothing.
version() {
	local version
	version=$(grep -v '^#' "$top/VERSION")
	if [ -e "$top/.git" ] && [ "$(git -C "$top" rev-parse --is-shallow-repository)" = false ]; then
		version+=+git$(git -C "$top" rev-list --count HEAD)
	fi
	echo "$version"
}

maintainer() {
	git -C "$top" log -1 --format='%an <%ae>' 2>/dev/null || echo "nobody <root@localhost>"
}

# pack ROOT DEB: make the package from the files below ROOT, and print its path. The same
# files make the same package.
pack() {
	SOURCE_DATE_EPOCH=$(git -C "$top" log -1 --format=%ct 2>/dev/null || echo 0) \
		dpkg-deb --root-owner-group --build "$1" "$2" >&2
	echo "$2"
}
