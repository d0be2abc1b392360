// SPDX-License-Identifier: GPL-2.0

//! Checks a shared pool that firmware or the administrator names.
//!
//! A shared pool is memory that the guest has set aside, and that the host gives to devices: the
//! "restricted-dma-pool" of the devicetree bindings (reserved-memory/shared-dma-pool.yaml), also
//! described by ACPI (a device PRP0001 of that compatible), or parameter `pool`. Firmware and
//! administrator are trusted, and may be mistaken: devices would overwrite memory that is in use.
//!
//! Pure: may be called in any context.

use super::{
    AddressForm,
    At,
    Extent,
    Fault,
    Finding,
    NamedBy,
    MIN_REGION_PAGES, //
};

/// What the guest's kernel uses memory for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ram {
    /// Nothing: it is not System RAM.
    Outside,
    /// It is System RAM, all of which was kept from the page allocator.
    Reserved,
    /// Some of it is System RAM that may be in use.
    Used,
}

/// A range of CPU physical addresses that is named as a shared pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Named {
    /// What names it.
    pub by: NamedBy,
    /// Where it begins.
    pub start: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What else is at the range of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings {
    /// What the kernel uses it for.
    pub ram: Ram,
    /// Whether it overlaps a BAR of a PCI device, or the window of a bridge.
    pub overlaps_bar: bool,
    /// Whether an IOMMU translates the device's accesses.
    pub behind_iommu: bool,
    /// Whether the device's bus has contiguous addresses for it.
    pub reachable: bool,
}

/// Checks a shared pool in a guest with pages of `page` bytes (wire format, R34, R41). Calls
/// `around` only if the pool has whole pages.
///
/// Nothing is trimmed: a range with a wrong end may be wrong as a whole.
pub fn check(named: &Named, page: u64, around: impl FnOnce() -> Surroundings) -> Finding {
    let &Named { by, start, bytes } = named;
    let needed = MIN_REGION_PAGES as u64 * page;
    let fault = if bytes == 0 {
        Fault::Empty
    } else if start % page != 0 || bytes % page != 0 || start.checked_add(bytes).is_none() {
        Fault::PoolUnaligned(page)
    } else if bytes < needed {
        Fault::TooSmall { bytes, needed }
    } else {
        let around = around();
        let in_linear_map = around.ram == Ram::Reserved;
        // Only the devicetree reserves the RAM that it names.
        if around.ram == Ram::Used || (in_linear_map && by != NamedBy::Devicetree) {
            Fault::PoolInRam
        } else if around.overlaps_bar {
            Fault::PoolOverlapsBar
        } else if around.behind_iommu {
            Fault::PoolBehindIommu
        } else if !around.reachable {
            Fault::PoolUnreachable
        } else {
            return Finding::Usable(Extent {
                start,
                bytes,
                at: At::SharedPool { by, in_linear_map },
                form: AddressForm::Bus,
            });
        }
    };
    Finding::Malformed(fault)
}

/// Parses `START+LENGTH`: numbers are decimal, or hexadecimal with 0x, and may end with K, M or G.
pub fn parse(text: &str) -> Option<Named> {
    let (start, bytes) = text.split_once('+')?;
    Some(Named {
        by: NamedBy::Parameter,
        start: number(start)?,
        bytes: number(bytes)?,
    })
}

fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let (digits, radix) = match digits.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (digits, 10),
    };
    // from_str_radix() takes a sign.
    if !digits.starts_with(|first: char| first.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix)
        .ok()?
        .checked_mul(1 << shift)
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_shared_pool))]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const NAMED: Named = Named {
        by: NamedBy::Acpi,
        start: 0x1d00_0000,
        bytes: 16 << 20,
    };
    const AROUND: Surroundings = Surroundings {
        ram: Ram::Outside,
        overlaps_bar: false,
        behind_iommu: false,
        reachable: true,
    };

    #[test]
    fn a_pool_is_taken_as_it_is() {
        for by in [NamedBy::Devicetree, NamedBy::Acpi, NamedBy::Parameter] {
            assert_eq!(
                check(&Named { by, ..NAMED }, PAGE, || AROUND),
                Finding::Usable(Extent {
                    start: 0x1d00_0000,
                    bytes: 16 << 20,
                    at: At::SharedPool {
                        by,
                        in_linear_map: false,
                    },
                    form: AddressForm::Bus,
                })
            );
        }
    }

    #[test]
    fn only_the_devicetree_reserves_ram() {
        for (by, ram, usable) in [
            (NamedBy::Devicetree, Ram::Reserved, true),
            (NamedBy::Devicetree, Ram::Used, false),
            (NamedBy::Acpi, Ram::Reserved, false),
            (NamedBy::Acpi, Ram::Used, false),
            (NamedBy::Parameter, Ram::Reserved, false),
            (NamedBy::Parameter, Ram::Used, false),
        ] {
            let around = Surroundings { ram, ..AROUND };
            match check(&Named { by, ..NAMED }, PAGE, || around) {
                Finding::Usable(extent) => {
                    assert!(usable);
                    let in_linear_map = true;
                    assert_eq!(extent.at, At::SharedPool { by, in_linear_map });
                }
                found => {
                    assert!(!usable);
                    assert_eq!(found, Finding::Malformed(Fault::PoolInRam));
                }
            }
        }
    }

    #[test]
    fn ranges_that_are_no_pool() {
        let Named { by, start, bytes } = NAMED;
        let too_small = Fault::TooSmall {
            bytes: 15 * PAGE,
            needed: 16 * PAGE,
        };
        for (start, bytes, fault) in [
            (start, 0, Fault::Empty),
            (start + 512, bytes, Fault::PoolUnaligned(PAGE)),
            (start, bytes - 1, Fault::PoolUnaligned(PAGE)),
            // It ends behind the last address.
            (0u64.wrapping_sub(PAGE), bytes, Fault::PoolUnaligned(PAGE)),
            (start, 15 * PAGE, too_small),
        ] {
            let mut looked = false;
            let found = check(&Named { by, start, bytes }, PAGE, || {
                looked = true;
                AROUND
            });
            assert_eq!(found, Finding::Malformed(fault));
            assert!(!looked);
        }
    }

    #[test]
    fn places_where_no_pool_can_be() {
        for (overlaps_bar, behind_iommu, reachable, fault) in [
            (true, false, true, Fault::PoolOverlapsBar),
            (false, true, true, Fault::PoolBehindIommu),
            (false, false, false, Fault::PoolUnreachable),
        ] {
            let around = Surroundings {
                overlaps_bar,
                behind_iommu,
                reachable,
                ..AROUND
            };
            assert_eq!(check(&NAMED, PAGE, || around), Finding::Malformed(fault));
        }
    }

    #[test]
    fn pages_are_those_of_the_guest() {
        for (start, page, whole) in [
            (0x1d00_1000, 0x1000, true),
            (0x1d00_1000, 0x4000, false),
            (0x1d00_4000, 0x4000, true),
            (0x1d00_4000, 0x1_0000, false),
            (0x1d01_0000, 0x1_0000, true),
        ] {
            let found = check(&Named { start, ..NAMED }, page, || AROUND);
            let unaligned = Finding::Malformed(Fault::PoolUnaligned(page));
            let is_whole = found != unaligned;
            assert_eq!(is_whole, whole);
        }
    }

    #[test]
    fn ranges_are_read() {
        for (text, range) in [
            ("0x1d000000+16M", Some((0x1d00_0000, 16 << 20))),
            ("486539264+0x1000000", Some((0x1d00_0000, 16 << 20))),
            ("4G+64k", Some((4 << 30, 64 << 10))),
            ("0+0", Some((0, 0))),
            ("", None),
            ("+", None),
            ("1G", None),
            ("1G+", None),
            ("+1G", None),
            ("1G++1G", None),
            ("1G+-1", None),
            ("0x+1", None),
            ("M+1", None),
            ("1G+1T", None),
            ("1 + 2", None),
            ("1+2+3", None),
            ("17179869184G+1", None),
            ("18446744073709551616+1", None),
        ] {
            let by = NamedBy::Parameter;
            assert_eq!(
                parse(text),
                range.map(|(start, bytes)| Named { by, start, bytes })
            );
        }
    }
}
