/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads to make the bindings of this module.
 *
 * Only virtio's own types and functions are taken from here (the allowlist in
 * Kbuild): everything that they refer to, struct device for one, is taken from
 * the kernel crate, so that both speak of the same Rust types.
 */
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "helpers.h"
#if IS_BUILTIN(CONFIG_KUNIT)
#include "tests/transport.h"
#endif
