// SPDX-License-Identifier: GPL-2.0

//! The module's parameters. They do not change after load.

use super::{
    bindings,
    policy::{
        can_bounce,
        types::{
            Name,
            Names,
            Types, //
        },
        Hint, //
    },
    wire::{
        shared_pool::{
            self,
            Named, //
        },
        Features, //
    }, //
};
use kernel::{
    prelude::*,
    str::CStr, //
};

/// All parameters.
#[derive(Clone, Copy)]
pub(crate) struct Parameters {
    /// Which regions are used without the bit.
    pub(crate) hint: Hint,
    /// The shared pool for devices for which firmware names no pool.
    pub(crate) pool: Option<Named>,
    /// Whether devices that had a driver when the module was loaded are unbound and bound.
    pub(crate) takeover: bool,
    /// Whether no driver is bound to a device that is not bounced.
    pub(crate) require: bool,
    /// The device types that `require` leaves alone.
    pub(crate) except: Types,
    /// Device types that are bounced though their drivers were never tried.
    pub(crate) types: Types,
    /// The bit that is VIRTIO_F_DMB, or none.
    pub(crate) dmb: Features,
    /// Whether disks may use packed rings.
    pub(crate) packed_disks: bool,
    /// First content of a mapping that the device only writes.
    pub(crate) from_device: FromDevice,
}

/// First content of a mapping that the device only writes: the parameter `from_device`.
#[derive(Clone, Copy)]
pub(crate) enum FromDevice {
    /// Zeroes if the buffer has [`FromDevice::SECTOR`] bytes or more, else the bytes of the buffer.
    Auto,
    /// The bytes of the buffer: a device that writes only part of it leaves the rest unchanged.
    Preserve,
    /// Zeroes: the device does not see the content of the buffer, and bytes that it does not write
    /// are copied out as zeroes.
    Clear,
}

impl FromDevice {
    /// The shortest data of a disk, in bytes. A shorter mapping is mostly a status or a header,
    /// which the driver may have set to the value for a device that writes nothing.
    const SECTOR: usize = 512;

    fn new() -> Self {
        // SAFETY: No requirements.
        match unsafe { bindings::virtio_swiotlb_from_device() } {
            bindings::virtio_swiotlb_from_device_VIRTIO_SWIOTLB_PRESERVE => Self::Preserve,
            bindings::virtio_swiotlb_from_device_VIRTIO_SWIOTLB_CLEAR => Self::Clear,
            _ => Self::Auto,
        }
    }

    /// The fewest bytes of a mapping that begins as zeroes.
    pub(crate) fn shortest_cleared(self) -> usize {
        match self {
            Self::Auto => Self::SECTOR,
            Self::Preserve => usize::MAX,
            Self::Clear => 0,
        }
    }
}

impl Parameters {
    /// Reads the parameters.
    ///
    /// # Errors
    ///
    /// `EINVAL`, after a message: for an unknown device type, for a device type in `types` that
    /// cannot be bounced, and for a `pool` that is no range.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: No requirements.
        let except = unsafe { bindings::virtio_swiotlb_except() };
        // SAFETY: The parameter is a string, and does not change.
        let except = unsafe { CStr::from_char_ptr(except) };
        // SAFETY: No requirements.
        let types = unsafe { bindings::virtio_swiotlb_types() };
        // SAFETY: As above.
        let types = device_types("types", unsafe { CStr::from_char_ptr(types) })?;
        if let Some(kind) = types.iter().find(|kind| !can_bounce(*kind)) {
            pr_err!("types lists {}, which cannot be bounced\n", Name(kind));
            return Err(EINVAL);
        }
        Ok(Self {
            // SAFETY: No requirements.
            hint: match unsafe { bindings::virtio_swiotlb_hint() } {
                bindings::virtio_swiotlb_hint_VIRTIO_SWIOTLB_HINT_NONE => Hint::None,
                bindings::virtio_swiotlb_hint_VIRTIO_SWIOTLB_HINT_ALL => Hint::All,
                _ => Hint::Pool,
            },
            // SAFETY: No requirements for the call; the parameter is a string, and does not change.
            pool: range(unsafe { CStr::from_char_ptr(bindings::virtio_swiotlb_pool()) })?,
            // SAFETY: No requirements.
            takeover: unsafe { bindings::virtio_swiotlb_takeover() },
            // SAFETY: No requirements.
            require: unsafe { bindings::virtio_swiotlb_require() },
            except: device_types("except", except)?,
            types,
            // SAFETY: No requirements.
            dmb: match unsafe { bindings::virtio_swiotlb_dmb() } {
                0 => Features(0),
                bit => Features(1 << bit),
            },
            // SAFETY: No requirements.
            packed_disks: unsafe { bindings::virtio_swiotlb_packed_disks() },
            from_device: FromDevice::new(),
        })
    }

    /// Whether devices of type `kind` may be bounced: their driver was tried, or `types` lists
    /// them.
    pub(crate) fn trusts(&self, kind: u32) -> bool {
        Types::TRIED.has(kind) || self.types.has(kind)
    }

    /// Whether a device of type `kind` must be bounced to have a driver.
    pub(crate) fn requires(&self, kind: u32) -> bool {
        self.require && !self.except.has(kind)
    }
}

/// The range in the parameter `pool`; `None` if the parameter is empty.
fn range(text: &CStr) -> Result<Option<Named>> {
    let text = text.to_str().unwrap_or("...");
    if text.is_empty() {
        return Ok(None);
    }
    let range = shared_pool::parse(text).ok_or(EINVAL);
    range.map(Some).inspect_err(|_| {
        pr_err!("pool is START+LENGTH, as in 0x1d000000+16M, not \"{text}\"\n");
    })
}

/// The device types that the parameter `name` lists.
fn device_types(name: &str, list: &CStr) -> Result<Types> {
    let parsed = match list.to_str() {
        Ok(list) => Types::parse(list),
        Err(_) => Err("..."),
    };
    parsed.map_err(|word| {
        pr_err!(
            "{name} lists {}, or numbers from 1 to 255, with commas; not \"{word}\"\n",
            Names
        );
        EINVAL
    })
}

// The pure files implement traits of core only.
impl kernel::fmt::Display for Names {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}
