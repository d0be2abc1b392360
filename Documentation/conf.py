# SPDX-License-Identifier: GPL-2.0
#
# The documentation is plain reStructuredText as in the kernel; this is all that
# sphinx-build needs. scripts/gates docs builds it with warnings as errors.

project = "virtio_swiotlb"
copyright = "the virtio_swiotlb authors, GPL-2.0"
root_doc = "index"
extensions = []
html_theme = "alabaster"
html_copy_source = False
html_show_sourcelink = False
nitpicky = True
