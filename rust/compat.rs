// SPDX-License-Identifier: GPL-2.0

//! What differs between the kernel series that the module is built for.
//!
//! The rest of the module is written for the newest of them. `Kbuild` sets `linux_7_2` for the
//! oldest; when that is no longer needed, all that is marked with it goes, here and there.

use kernel::{
    bindings::dma_data_direction,
    module_param::ModuleParamAccess, //
};

/// Calls a macro with the type of a parameter that is on or off, and its two values.
#[cfg(not(linux_7_2))]
macro_rules! with_flag {
    ($declare:ident) => {
        $declare! { bool, true, false }
    };
}

/// Whether a parameter is on.
#[cfg(not(linux_7_2))]
pub(crate) fn is_on(flag: &ModuleParamAccess<bool>) -> bool {
    flag.value()
}

/// The number of a direction in C.
#[cfg(not(linux_7_2))]
#[inline(always)]
pub(crate) fn direction_number(direction: dma_data_direction) -> usize {
    direction.0 as usize
}

// --- Linux 7.2: no parameters of type bool, and directions are plain numbers ---

#[cfg(linux_7_2)]
macro_rules! with_flag {
    ($declare:ident) => {
        $declare! { u8, 1, 0 }
    };
}

#[cfg(linux_7_2)]
pub(crate) fn is_on(flag: &ModuleParamAccess<u8>) -> bool {
    *flag.value() != 0
}

#[cfg(linux_7_2)]
#[inline(always)]
pub(crate) fn direction_number(direction: dma_data_direction) -> usize {
    direction as usize
}
