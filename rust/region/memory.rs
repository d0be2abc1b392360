// SPDX-License-Identifier: GPL-2.0

//! A region's bytes: claims the range of physical addresses and maps it.

use super::super::{
    bindings,
    policy::Reason,
    virtio::Device,
    wire::Extent, //
};
use core::ptr::NonNull;
use kernel::{
    bindings as core_bindings,
    prelude::*,
    str::CString, //
};

/// The bytes of a region, reachable for the CPU as long as this lives.
pub(crate) struct Memory {
    base: NonNull<u8>,
    // `None` if the mapping outlives the region.
    _mapping: Option<Mapping>,
}

impl Memory {
    /// Claims and maps `extent`, a range of a BAR of `dev`. May sleep.
    ///
    /// # Errors
    ///
    /// [`Reason::Claimed`] if something else uses the addresses, [`Reason::NoMemory`] if they
    /// cannot be mapped.
    pub(super) fn claim(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let mapping = Mapping::new(dev, extent)?;
        Ok(Self {
            base: mapping.base,
            _mapping: Some(mapping),
        })
    }

    /// Takes memory whose mapping outlives the region.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn mapped(base: NonNull<u8>) -> Self {
        Self {
            base,
            _mapping: None,
        }
    }

    /// The first byte.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How the CPU caches it: "wb" (write-back), "uc-"...
    pub(super) fn cache_mode(&self) -> &'static CStr {
        // SAFETY: A kernel address that is mapped; the result is a static string.
        unsafe {
            CStr::from_char_ptr(bindings::virtio_swiotlb_cache_mode(
                self.base.as_ptr().cast(),
            ))
        }
    }
}

/// A claimed range of physical addresses, mapped write-back if the architecture can.
///
/// # Invariants
///
/// `base` is a mapping from `memremap()`.
struct Mapping {
    base: NonNull<u8>,
    // Dropped after `drop()` has undone the mapping. `None` where the BAR is claimed as a whole
    // by the device's own transport driver.
    _claim: Option<Claim>,
}

impl Mapping {
    fn new(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let claim = match Claim::new(dev, extent) {
            // The transport driver claims whole BARs that hold its structures: then the claim
            // against everybody else is there already.
            Err(Reason::Claimed) if extent.shares_bar => None,
            claim => Some(claim?),
        };
        let mut flags = core_bindings::MEMREMAP_WB as c_ulong;
        // What the device reads must not be encrypted with the guest's key.
        // SAFETY: No requirements.
        if unsafe { bindings::virtio_swiotlb_memory_encrypted() } {
            flags |= core_bindings::MEMREMAP_DEC as c_ulong;
        }
        // SAFETY: The range is this device's, checked and claimed.
        let base = unsafe { core_bindings::memremap(extent.start, extent.bytes as usize, flags) };
        // INVARIANT: Mapped just now.
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(Reason::NoMemory)?,
            _claim: claim,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { core_bindings::memunmap(self.base.as_ptr().cast()) };
    }
}

/// An entry in /proc/iomem, as long as this lives.
///
/// # Invariants
///
/// `start` and `bytes` are a busy region requested with the name.
struct Claim {
    start: u64,
    bytes: u64,
    _name: CString,
}

impl Claim {
    fn new(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let name = CString::try_from_fmt(fmt!("virtio{} swiotlb", dev.index()))
            .map_err(|_| Reason::NoMemory)?;
        // SAFETY: The root of memory resources is static; the name lives as long as the claim.
        let resource = unsafe {
            core_bindings::__request_region(
                &raw mut core_bindings::iomem_resource,
                extent.start,
                extent.bytes,
                name.as_char_ptr(),
                0,
            )
        };
        if resource.is_null() {
            return Err(Reason::Claimed);
        }
        // INVARIANT: Requested just now.
        Ok(Self {
            start: extent.start,
            bytes: extent.bytes,
            _name: name,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe {
            core_bindings::__release_region(
                &raw mut core_bindings::iomem_resource,
                self.start,
                self.bytes,
            );
        }
    }
}
