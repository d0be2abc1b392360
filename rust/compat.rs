// SPDX-License-Identifier: GPL-2.0

//! What differs between the kernel series that the module is built for.
//!
//! The rest of the module is written for the newest of them. `Kbuild` sets `linux_7_2` for the
//! oldest; when that is no longer needed, all that is marked with it goes, here and there.

use kernel::bindings::dma_data_direction;

/// The number of a direction in C.
#[cfg(not(linux_7_2))]
#[inline(always)]
pub(crate) fn direction_number(direction: dma_data_direction) -> usize {
    direction.0 as usize
}

// --- Linux 7.2: directions are plain numbers ---

#[cfg(linux_7_2)]
#[inline(always)]
pub(crate) fn direction_number(direction: dma_data_direction) -> usize {
    direction as usize
}
