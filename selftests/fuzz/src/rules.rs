// SPDX-License-Identifier: GPL-2.0

//! What is read of a device, and what is decided.

use crate::input::Input;
use crate::policy::limits::{
    features_to_mask, longest_queue, most_segments, needed, request_queues, split, Limits, Room,
};
use crate::policy::{decide, is_relevant, offers_dmb, Decision, Facts, Hint};
use crate::wire::capabilities::{ConfigSpace, Search, COMMON_BYTES, COMMON_DMB_BYTES};
use crate::wire::{
    bounds, uses_shared_memory, AddressForm, At, Bar, Bound, DmbRegisters, Extent, Features,
    Finding, Findings, NamedBy, BARS, CONFIG_SPACE_BYTES, MIN_REGION_PAGES,
};

/// A page size of a guest, in bytes.
fn page(input: &mut Input<'_>) -> usize {
    4096 << (2 * (input.u8() % 3))
}

fn bars(input: &mut Input<'_>) -> [Bar; BARS] {
    std::array::from_fn(|_| match input.u8() % 8 {
        0 => Bar::Absent,
        1 => Bar::Io,
        2 => Bar::Unassigned,
        3 => Bar::Memory {
            start: input.u64(),
            bytes: input.u64(),
            prefetchable: true,
        },
        n => Bar::Memory {
            start: u64::from(input.u16()) << 24,
            bytes: 1 << (n + 12),
            prefetchable: n != 7,
        },
    })
}

/// Whether these are the addresses of a part of a BAR of the device.
fn check_extent(extent: &Extent, bars: &[Bar; BARS], page: u64) {
    let At::Bar { bar, offset, .. } = extent.at else {
        panic!("a region that is in no BAR");
    };
    let Bar::Memory {
        start,
        bytes,
        prefetchable,
    } = bars[usize::from(bar)]
    else {
        panic!("a region in a BAR that is no memory");
    };
    assert!(prefetchable);
    assert!(extent.bytes >= MIN_REGION_PAGES as u64 * page);
    assert_eq!(extent.start % page, 0);
    assert_eq!(extent.bytes % page, 0);
    assert_eq!(extent.start, start + offset);
    let end = offset.checked_add(extent.bytes);
    assert!(end.is_some_and(|end| end <= bytes));
    assert!(extent.start.checked_add(extent.bytes).is_some());
}

/// Configuration space of any content.
pub fn wire(data: &[u8]) {
    let mut input = Input::new(data);
    let bars = bars(&mut input);
    let mut space = [0; CONFIG_SPACE_BYTES];
    space.iter_mut().for_each(|byte| *byte = input.u8());
    let page = page(&mut input) as u64;
    let search = Search {
        bars: &bars,
        page,
        device_type: input.u8().into(),
    };
    let registers = (input.u8() & 1 != 0).then(|| DmbRegisters {
        shm_id: input.u8().into(),
        memory_type: (input.u8() & 1).into(),
    });
    let find = || Findings {
        swiotlb: ConfigSpace::new(&space).region(&search),
        dmb: ConfigSpace::new(&space).shared_region(registers, &search),
        ..Findings::NONE
    };
    let found = find();
    for finding in [found.swiotlb, found.dmb] {
        match finding {
            Finding::Absent => {}
            Finding::Usable(extent) => check_extent(&extent, &bars, page),
            Finding::Malformed(fault) => assert!(!fault.to_string().is_empty()),
        }
    }
    let form = |finding| match finding {
        Finding::Usable(extent) => Some(extent.form),
        _ => None,
    };
    assert!(matches!(form(found.swiotlb), None | Some(AddressForm::Bus)));
    if let Some(form) = form(found.dmb) {
        // R29, R31.
        assert!(matches!(form, AddressForm::Offset(offset) if (page..2 * page).contains(&offset)));
        let registers = registers.expect("there is no region without registers");
        assert_eq!(registers.memory_type, DmbRegisters::COHERENT);
        assert!(!uses_shared_memory(
            search.device_type,
            registers.shm_id as u8
        ));
    }
    // It is a function of the bytes.
    assert_eq!(found, find());
    for needed in [COMMON_BYTES, COMMON_DMB_BYTES] {
        let Some(common) = ConfigSpace::new(&space).common(&bars, needed) else {
            continue;
        };
        let inside = |bar: &Bar| match *bar {
            Bar::Memory { start, bytes, .. } => common
                .checked_sub(start)
                .is_some_and(|offset| offset + needed as u64 <= bytes),
            _ => false,
        };
        assert!(bars.iter().any(inside));
    }
}

/// Any facts, and any requests of a driver within the limits that follow.
pub fn policy(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let page = page(&mut input);
    let finding = match flags & 3 {
        0 => Finding::Absent,
        1 => Finding::Malformed(crate::wire::Fault::Empty),
        _ => Finding::Usable(Extent {
            start: u64::from(input.u32()) << 12,
            bytes: (MIN_REGION_PAGES as u64 + u64::from(input.u16())) * page as u64,
            at: At::Bar {
                bar: input.u8() % 6,
                offset: 0,
                shared: flags & 4 != 0,
            },
            form: AddressForm::Bus,
        }),
    };
    let dmb = match input.u8() % 3 {
        0 => Finding::Absent,
        1 => Finding::Malformed(crate::wire::Fault::NoRegisters),
        _ => Finding::Usable(Extent {
            start: u64::from(input.u32()) << 16,
            bytes: (MIN_REGION_PAGES * page) as u64,
            at: At::Bar {
                bar: 0,
                offset: page as u64,
                shared: false,
            },
            form: AddressForm::Offset(page as u64),
        }),
    };
    let shared_pool = match input.u8() % 3 {
        0 => Finding::Absent,
        1 => Finding::Malformed(crate::wire::Fault::PoolInRam),
        _ => Finding::Usable(Extent {
            start: u64::from(input.u32()) << 16,
            bytes: (MIN_REGION_PAGES * page) as u64,
            at: At::SharedPool {
                by: NamedBy::Acpi,
                in_linear_map: false,
            },
            form: AddressForm::Bus,
        }),
    };
    let found = Findings {
        swiotlb: finding,
        dmb,
        shared_pool,
    };
    let facts = Facts {
        device_type: input.u8().into(),
        offered: Features(input.u64()),
        found,
        dmb: Features(u64::from(input.u8() & 1) << 44),
        names_regions: flags & 8 != 0,
        own_mapping: flags & 16 != 0,
        hint: match input.u8() % 3 {
            0 => Hint::None,
            1 => Hint::Pool,
            _ => Hint::All,
        },
        required: flags & 64 != 0,
        tried: flags & 128 != 0,
    };
    let bit = facts.offered.has(Features::SWIOTLB) || offers_dmb(facts.offered, facts.dmb);
    let decision = decide(&facts);
    match decision {
        Decision::Accept(extent) | Decision::Hint(extent) => {
            assert!([finding, dmb, shared_pool].contains(&Finding::Usable(extent)));
            assert!(is_relevant(facts.offered, facts.dmb, found));
            assert!(facts.offered.has(decision.accepted(facts.dmb)));
            assert!(!facts.own_mapping && facts.tried);
            assert_eq!(matches!(decision, Decision::Accept(_)), bit);
            assert!(bit || facts.hint != Hint::None);
            let room = Room::new(extent.bytes as usize, page);
            limits(&mut input, facts.device_type, room);
            queues(&mut input, &facts, room);
            requests(&mut input, &facts, room);
            units(&mut input, facts.device_type, room);
        }
        // Without the bit nothing may fail because of a region.
        Decision::Decline(_) => assert!(bit && !facts.required),
        Decision::Refuse(_) => assert!(bit),
        Decision::Bar(_) => assert!(facts.required),
        Decision::Ignore(_) => assert!(!facts.required),
    }
    assert_eq!(decision.extent().is_none(), decision.reason().is_some());
    if let Some(reason) = decision.reason() {
        assert!(!reason.to_string().is_empty());
    }
}

/// A request within the limits fits a quarter of the pool.
fn limits(input: &mut Input<'_>, kind: u32, room: Room) {
    let pool = room.bytes;
    let segments = input.u32();
    let limits = Limits::new(kind, room, pool / 4, segments);
    assert!(limits.max_mapping <= pool / 4 && limits.max_segments >= 1);
    for &(_, _, bound) in bounds(kind) {
        let clamped = limits.clamp(bound, segments);
        match bound {
            Bound::Segments => {
                assert!(clamped <= segments);
                let each = limits.max_mapping + 4096;
                assert!(clamped as usize * each <= (pool / 4).max(each));
            }
            Bound::Sectors => assert!(clamped as usize * 512 <= pool),
            Bound::Queues => assert!(clamped as usize * room.page() <= pool / 4),
        }
    }
}

/// A request without a table fits each queue of requests, however short the device or the module
/// makes it.
fn requests(input: &mut Input<'_>, facts: &Facts, room: Room) {
    let kind = facts.device_type;
    let features = facts.offered;
    let entries = input.u16() % 1023 + 2;
    let cpus = u32::from(input.u8()) + 1;
    let most = most_segments(kind, features, cpus, room, |_| Some(entries));
    assert!(most >= 1);
    if bounds(kind).is_empty() || features.has(Features::INDIRECT_DESC) {
        assert_eq!(most, u32::MAX);
        return;
    }
    let queues = request_queues(kind, features, cpus, room);
    let longest = longest_queue(kind, features, queues.end, queues.start, room);
    let entries = u32::from(longest.map_or(entries, |longest| longest.min(entries)));
    assert!(most + 2 <= entries || most == 1);
    // No fewer queues are shortened more.
    for end in queues.start + 1..queues.end {
        let longer = longest_queue(kind, features, end, queues.start, room);
        assert!(longer.is_none_or(|longer| u32::from(longer) >= entries));
    }
}

/// A region that is said to be needed is larger, and enough.
fn units(input: &mut Input<'_>, kind: u32, room: Room) {
    let unit = input.u32();
    let segments = input.u32();
    if let Some(bytes) = needed(kind, room, unit, segments) {
        assert!(bytes > room.bytes && bytes.is_power_of_two());
        assert_eq!(
            needed(kind, Room::new(bytes, room.page()), unit, segments),
            None
        );
    }
}

/// The rings of all queues have room, each of them if it is as long as it may be.
fn queues(input: &mut Input<'_>, facts: &Facts, room: Room) {
    let pool = room.bytes;
    let kind = facts.device_type;
    let dropped = features_to_mask(kind, facts.offered, room);
    assert!(facts.offered.has(dropped));
    let features = facts.offered.without(dropped);
    let packed = features.has(Features::RING_PACKED);
    let count = u32::from(input.u16() % 256) + 1;
    let page = room.page();
    let mut pages = 0;
    for index in 0..count {
        let Some(longest) = longest_queue(kind, features, count, index, room) else {
            return;
        };
        assert!(longest >= 2 && longest.is_power_of_two());
        let entries = usize::from(longest);
        pages += match packed {
            true => (16 * entries).div_ceil(page) + 2,
            false => (26 * entries + 75).div_ceil(page),
        };
    }
    let least = if packed { 3 } else { 1 };
    let may_pack = split(kind, room, true).is_none();
    if count as usize * least * page <= pool / 4 && (!packed || may_pack) {
        assert!(pages * page <= pool / 4);
    }
}
