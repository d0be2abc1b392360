// SPDX-License-Identifier: GPL-2.0

//! The bytes of a region or of a shared pool: claims the range of physical addresses and maps it.
//! Where guest memory is encrypted, shares it with the host.

use super::super::{
    bindings,
    policy::Reason,
    virtio::Device,
    wire::{
        At,
        Extent, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    bindings as core_bindings,
    prelude::*,
    str::CString, //
};

/// The bytes of a region or of a shared pool, mapped until this is dropped.
pub(crate) struct Memory {
    base: NonNull<u8>,
    // Dropped before the mapping.
    _shared: Option<Shared>,
    // `None` if the mapping outlives the region.
    _mapping: Option<Mapping>,
}

// SAFETY: The mapping is the kernel's and not bound to a thread.
unsafe impl Send for Memory {}

impl Memory {
    /// Claims and maps `extent`, a range of a BAR of `dev`. May sleep.
    ///
    /// # Errors
    ///
    /// [`Reason::Claimed`] if something else uses the addresses, [`Reason::NoMemory`] if they
    /// cannot be mapped.
    pub(super) fn of_bar(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let name = CString::try_from_fmt(fmt!("virtio{} swiotlb", dev.index()));
        let claim = match Claim::new(extent, name) {
            // The transport driver claims whole BARs that hold its structures. That claim protects
            // the region as well.
            Err(Reason::Claimed) if matches!(extent.at, At::Bar { shared: true, .. }) => None,
            claim => Some(claim?),
        };
        let mut flags = core_bindings::MEMREMAP_WB;
        // The device cannot read bytes that are encrypted with the guest's key.
        if is_encrypted() {
            flags |= core_bindings::MEMREMAP_DEC;
        }
        let mapping = Mapping::new(extent, flags, claim)?;
        Ok(Self {
            base: mapping.base,
            _shared: None,
            _mapping: Some(mapping),
        })
    }

    /// Claims and maps all of a shared pool, and gives the host access to it. May sleep.
    ///
    /// # Errors
    ///
    /// Those of [`Memory::of_bar`], and [`Reason::Encrypted`] if the host cannot be given access.
    pub(super) fn of_pool(extent: &Extent) -> Result<Self, Reason> {
        let in_linear_map = matches!(
            extent.at,
            At::SharedPool {
                in_linear_map: true,
                ..
            }
        );
        // Only pages of the linear map can be shared with the host.
        if !in_linear_map && is_encrypted() {
            return Err(Reason::Encrypted);
        }
        // The kernel itself has claimed memory that it reserved at boot.
        let claim = match in_linear_map {
            true => None,
            false => Some(Claim::new(
                extent,
                CString::try_from_fmt(fmt!("virtio_swiotlb pool")),
            )?),
        };
        let mapping = Mapping::new(extent, core_bindings::MEMREMAP_WB, claim)?;
        let shared = match in_linear_map {
            true => Some(Shared::new(mapping.base, extent.bytes)?),
            false => None,
        };
        Ok(Self {
            base: mapping.base,
            _shared: shared,
            _mapping: Some(mapping),
        })
    }

    /// Takes memory whose mapping outlives the region.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn mapped(base: NonNull<u8>) -> Self {
        Self {
            base,
            _shared: None,
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

/// Whether memory of the guest is encrypted unless it is shared with the host.
fn is_encrypted() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::virtio_swiotlb_memory_encrypted() }
}

/// Pages of the linear map that the host has access to, where guest memory is encrypted.
///
/// # Invariants
///
/// The pages have no other user, and have been shared.
struct Shared {
    base: NonNull<u8>,
    bytes: u64,
}

impl Shared {
    fn new(base: NonNull<u8>, bytes: u64) -> Result<Self, Reason> {
        // SAFETY: Whole pages of the linear map that were reserved for this.
        if unsafe { bindings::virtio_swiotlb_share(base.as_ptr().cast(), bytes) } != 0 {
            return Err(Reason::Encrypted);
        }
        // INVARIANT: Shared just now.
        Ok(Self { base, bytes })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        if unsafe { bindings::virtio_swiotlb_unshare(self.base.as_ptr().cast(), self.bytes) } != 0 {
            pr_err!("a shared pool stays open to the host: it could not be encrypted again\n");
        }
    }
}

/// A range of physical addresses, mapped write-back if the architecture can.
///
/// # Invariants
///
/// `base` is a mapping from `memremap()`.
struct Mapping {
    base: NonNull<u8>,
    // Dropped after `drop()` has undone the mapping. `None` if others have claimed the range for
    // this use.
    _claim: Option<Claim>,
}

impl Mapping {
    fn new(extent: &Extent, flags: u32, claim: Option<Claim>) -> Result<Self, Reason> {
        // SAFETY: The range is checked and claimed.
        let base = unsafe {
            core_bindings::memremap(extent.start, extent.bytes as usize, flags as c_ulong)
        };
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
    /// Claims a range under a name, if there was memory for that.
    fn new(extent: &Extent, name: Result<CString>) -> Result<Self, Reason> {
        let name = name.map_err(|_| Reason::NoMemory)?;
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
