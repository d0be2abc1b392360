// SPDX-License-Identifier: GPL-2.0

//! What is read of a device, and what is decided.

use crate::input::Input;
use crate::policy::{concerns, decide, Decision, Facts, Limits, MIN_REGION_BYTES};
use crate::wire::{
    bounds, Bar, Bound, ConfigSpace, Extent, Features, Finding, BARS, CONFIG_SPACE_BYTES,
    PAGE_BYTES,
};

fn bars(input: &mut Input<'_>) -> [Bar; BARS] {
    std::array::from_fn(|_| match input.u8() % 8 {
        0 => Bar::Absent,
        1 => Bar::Io,
        2 => Bar::Unassigned,
        3 => Bar::Memory {
            start: input.u64(),
            bytes: input.u64(),
        },
        n => Bar::Memory {
            start: u64::from(input.u16()) << 24,
            bytes: 1 << (n + 12),
        },
    })
}

/// Whether these are the addresses of a part of a BAR of the device.
fn check_extent(extent: &Extent, bars: &[Bar; BARS]) {
    let Bar::Memory { start, bytes } = bars[usize::from(extent.bar)] else {
        panic!("a region in a BAR that is no memory");
    };
    assert!(extent.bytes > 0);
    assert_eq!(extent.start % PAGE_BYTES, 0);
    assert_eq!(extent.bytes % PAGE_BYTES, 0);
    assert_eq!(extent.start, start + extent.offset);
    let end = extent.offset.checked_add(extent.bytes);
    assert!(end.is_some_and(|end| end <= bytes));
    assert!(extent.start.checked_add(extent.bytes).is_some());
}

/// Configuration space of any content.
pub fn wire(data: &[u8]) {
    let mut input = Input::new(data);
    let bars = bars(&mut input);
    let mut space = [0; CONFIG_SPACE_BYTES];
    space.iter_mut().for_each(|byte| *byte = input.u8());
    let finding = ConfigSpace::new(&space).region(&bars);
    match finding {
        Finding::Absent => {}
        Finding::Usable(extent) => check_extent(&extent, &bars),
        Finding::Malformed(fault) => assert!(!fault.to_string().is_empty()),
    }
    // It is a function of the bytes.
    assert_eq!(finding, ConfigSpace::new(&space).region(&bars));
}

/// Any facts, and any requests of a driver within the limits that follow.
pub fn policy(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let finding = match flags & 3 {
        0 => Finding::Absent,
        1 => Finding::Malformed(crate::wire::Fault::Empty),
        _ => Finding::Usable(Extent {
            bar: input.u8() % 6,
            offset: 0,
            start: u64::from(input.u32()) << 12,
            bytes: u64::from(input.u16()) << 12,
            shares_bar: flags & 4 != 0,
        }),
    };
    let facts = Facts {
        device_type: input.u8().into(),
        offered: Features(input.u64()),
        finding,
        names_regions: flags & 8 != 0,
        own_mapping: flags & 16 != 0,
        hint: flags & 32 != 0,
    };
    let bit = facts.offered.has(Features::SWIOTLB);
    let decision = decide(&facts);
    match decision {
        Decision::Accept(extent) | Decision::Hint(extent) => {
            assert_eq!(Finding::Usable(extent), finding);
            assert!(extent.bytes >= MIN_REGION_BYTES);
            assert!(concerns(facts.offered, finding));
            assert!(!facts.own_mapping);
            assert_eq!(matches!(decision, Decision::Accept(_)), bit);
            assert!(bit || facts.hint);
            limits(&mut input, facts.device_type, extent.bytes as usize);
        }
        // Without the bit nothing may fail because of a region.
        Decision::Decline(_) | Decision::Refuse(_) => assert!(bit),
        Decision::Ignore(_) => {}
    }
    assert_eq!(decision.extent().is_none(), decision.reason().is_some());
    if let Some(reason) = decision.reason() {
        assert!(!reason.to_string().is_empty());
    }
}

/// A request within the limits fits a quarter of the pool.
fn limits(input: &mut Input<'_>, kind: u32, pool: usize) {
    let segments = input.u32();
    let limits = Limits::new(kind, pool, pool / 4, segments);
    assert!(limits.max_mapping <= pool / 4 && limits.max_segments >= 1);
    for &(_, bound) in bounds(kind) {
        let clamped = limits.clamp(bound, segments);
        match bound {
            Bound::Segments => {
                assert!(clamped <= segments);
                let each = limits.max_mapping + PAGE_BYTES as usize;
                assert!(clamped as usize * each <= (pool / 4).max(each));
            }
            Bound::Sectors => assert!(clamped as usize * 512 <= pool),
        }
    }
}
