// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings with arbitrary contents. What is taken from them agrees with a model
//! that has no notion of time, lies in the region, and ends.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use swiotlb_rings::{
    Buffers, Memory, Queue, Request, RingAddresses, RingMemory, SharedMemoryCapability,
    SwiotlbCapability, Walker, Window, CAPABILITY64_BYTES, CAPABILITY_BYTES, PCI_CAP_ID_VENDOR,
    VIRTIO_PCI_CAP_SHARED_MEMORY_CFG, VIRTIO_PCI_CAP_SWIOTLB,
};

const BASE: u64 = 0x38_0000_0000;
const LEN: usize = 0x400;
const SIZE: u16 = 8;
const AVAIL: usize = 0x80;
const USED: usize = 0xa0;
/// Tables lie here, and buffers anywhere.
const TABLES: usize = 0x100;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// A packed descriptor that is available in the first lap.
const AVAILABLE: u16 = 1 << 7;
/// What an element that is used in the first lap has besides.
const USED_FLAG: u16 = 1 << 15;

/// The same cases each time.
fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    }
}

/// Memory of a test, which nobody else writes.
struct Bytes(RefCell<Vec<u8>>);

impl Bytes {
    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Some(bytes)
    }
}

impl RingMemory for Bytes {
    fn load_u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn load_u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn store_u16(&self, at: usize, value: u16) -> Option<()> {
        self.write(at, &value.to_le_bytes())
    }

    fn read(&self, at: usize, data: &mut [u8]) -> Option<()> {
        data.copy_from_slice(self.0.borrow().get(at..at + data.len())?);
        Some(())
    }

    fn write(&self, at: usize, data: &[u8]) -> Option<()> {
        let mut bytes = self.0.borrow_mut();
        bytes.get_mut(at..at + data.len())?.copy_from_slice(data);
        Some(())
    }

    fn pause(&self) {}
}

fn ring(packed: bool) -> RingAddresses {
    RingAddresses {
        size: SIZE,
        packed,
        desc: BASE,
        driver: BASE + AVAIL as u64,
        device: BASE + USED as u64,
    }
}

fn memory(bytes: &[u8]) -> Memory<Bytes> {
    let window = Window {
        base: BASE,
        len: bytes.len() as u64,
    };
    Memory::new([(window, Bytes(RefCell::new(bytes.to_vec())))])
}

/// The fields of a descriptor. A packed one has `next` for its buffer ID.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(self, packed: bool) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        let (flags, next) = if packed { (14, 12) } else { (12, 14) };
        bytes[flags..flags + 2].copy_from_slice(&self.flags.to_le_bytes());
        bytes[next..next + 2].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    fn at(bytes: &[u8], at: usize, packed: bool) -> Self {
        let number = |from: usize, len: usize| {
            let mut raw = [0; 8];
            raw[..len].copy_from_slice(&bytes[at + from..at + from + len]);
            u64::from_le_bytes(raw)
        };
        let (flags, next) = if packed { (14, 12) } else { (12, 14) };
        Self {
            addr: number(0, 8),
            len: number(8, 4) as u32,
            flags: number(flags, 2) as u16,
            next: number(next, 2) as u16,
        }
    }

    /// Where it points to in the region.
    fn offset(self) -> Option<usize> {
        let offset = self.addr.checked_sub(BASE)?;
        (u128::from(offset) + u128::from(self.len) <= LEN as u128).then_some(offset as usize)
    }
}

/// Most are as a driver would write them, so that chains have some length.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags =
        prop_oneof![3 => Just(0), 3 => Just(NEXT), 1 => Just(WRITE), 2 => Just(NEXT | WRITE)];
    let buffers = (BASE..BASE + LEN as u64, 0..32u32, flags, 0..SIZE);
    let table =
        |(at, entries, next)| (BASE + TABLES as u64 + 16 * at, 16 * entries, INDIRECT, next);
    let tables = (0..8u64, 1..5u32, 0..SIZE).prop_map(table);
    let wrong = (any::<u64>(), any::<u32>(), 0..8u16, 0..SIZE + 2);
    prop_oneof![16 => buffers, 3 => tables, 1 => wrong].prop_map(|(addr, len, flags, next)| {
        Descriptor {
            addr,
            len,
            flags,
            next,
        }
    })
}

/// A region with a ring, tables, and what is available in the ring.
fn region(packed: bool) -> impl Strategy<Value = Vec<u8>> {
    let marks = vec(prop_oneof![5 => Just(AVAILABLE), 1 => Just(0)], 8);
    let heads = vec(prop_oneof![20 => 0..SIZE, 1 => Just(SIZE)], 8);
    let tables = vec(descriptor(), 12);
    (vec(descriptor(), 8), marks, tables, heads, 0..=SIZE).prop_map(
        move |(ring, marks, tables, heads, index)| {
            let mut bytes = vec![0; LEN];
            let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
            for (n, (mut d, mark)) in ring.into_iter().zip(marks).enumerate() {
                d.flags |= if packed { mark } else { 0 };
                put(16 * n, &d.bytes(packed));
            }
            for (n, d) in tables.into_iter().enumerate() {
                put(TABLES + 16 * n, &d.bytes(packed));
            }
            if !packed {
                put(AVAIL + 2, &index.to_le_bytes());
                for (n, head) in heads.into_iter().enumerate() {
                    put(AVAIL + 4 + 2 * n, &head.to_le_bytes());
                }
            }
            bytes
        },
    )
}

/// A buffer: offset, length, whether the device writes it.
type Buffer = (usize, u32, bool);

fn buffer(d: Descriptor) -> Option<Buffer> {
    Some((d.offset()?, d.len, d.flags & WRITE != 0))
}

/// The buffers of an indirect table; none if a driver may not write such a table.
fn table(bytes: &[u8], table: Descriptor, packed: bool) -> Option<Vec<Buffer>> {
    let start = table.offset()?;
    let entries = table.len as usize / 16;
    if entries == 0 || table.len % 16 != 0 {
        return None;
    }
    let mut buffers = Vec::new();
    let mut entry = 0;
    while buffers.len() < entries {
        let d = Descriptor::at(bytes, start + 16 * entry, packed);
        if d.flags & INDIRECT != 0 {
            return None;
        }
        buffers.push(buffer(d)?);
        entry = match packed {
            true => entry + 1,
            false if d.flags & NEXT == 0 => return Some(buffers),
            false => usize::from(d.next),
        };
        if !packed && entry >= entries {
            return None;
        }
    }
    packed.then_some(buffers)
}

/// The buffers of a chain in a split ring; none if a driver may not write such a chain.
fn split_chain(bytes: &[u8], head: u16) -> Option<Vec<Buffer>> {
    let (mut buffers, mut index) = (Vec::new(), head);
    while index < SIZE && buffers.len() < SIZE.into() {
        let d = Descriptor::at(bytes, 16 * usize::from(index), false);
        if d.flags & INDIRECT != 0 {
            buffers.extend(table(bytes, d, false)?);
            return (d.flags & NEXT == 0).then_some(buffers);
        }
        buffers.push(buffer(d)?);
        if d.flags & NEXT == 0 {
            return Some(buffers);
        }
        index = d.next;
    }
    None
}

/// All chains that are available in a split ring, by head.
fn split_chains(bytes: &[u8]) -> Vec<(u16, Option<Vec<Buffer>>)> {
    let number = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let heads = (0..usize::from(number(AVAIL + 2))).map(|n| number(AVAIL + 4 + 2 * n));
    heads.map(|head| (head, split_chain(bytes, head))).collect()
}

/// All chains that are available in a packed ring, by buffer ID, up to the first that a
/// driver may not write.
fn packed_chains(bytes: &[u8]) -> Vec<(u16, Option<Vec<Buffer>>)> {
    let (mut chains, mut slot) = (Vec::new(), 0);
    let at = |slot: usize| Descriptor::at(bytes, 16 * (slot % 8), true);
    // The flags of the second lap are others.
    while slot < 8 && at(slot).flags & AVAILABLE != 0 {
        let (mut buffers, first) = (Some(Vec::new()), slot);
        loop {
            let d = at(slot);
            let more = d.flags & NEXT != 0;
            let part = match d.flags & INDIRECT {
                0 => buffer(d).map(|buffer| vec![buffer]),
                _ if more || slot != first => None,
                _ => table(bytes, d, true),
            };
            buffers = buffers.zip(part).map(|(all, part)| [all, part].concat());
            slot += 1;
            if !more || buffers.is_none() || slot - first == 8 {
                chains.push((d.next, buffers.filter(|_| !more)));
                break;
            }
        }
        if chains.last().is_some_and(|(_, buffers)| buffers.is_none()) {
            break;
        }
    }
    chains
}

/// What the first look at a packed ring has to find.
#[derive(Debug, Default)]
struct PackedLook {
    chains: u64,
    lost: u64,
    /// Whether the driver is accused of anything.
    accused: bool,
    /// All buffers, if nothing is wrong with any.
    buffers: Option<Vec<Buffer>>,
    /// By buffer ID: what is available and not used, with the number of descriptors, if that
    /// is certain.
    requests: Option<BTreeMap<u16, (usize, Vec<Buffer>)>>,
}

/// Each descriptor is judged by itself. None is used: that flag is in no descriptor.
fn packed_look(bytes: &[u8]) -> PackedLook {
    let ring: Vec<_> = (0..8)
        .map(|n| Descriptor::at(bytes, 16 * n, true))
        .collect();
    let is_available = |d: &&Descriptor| d.flags & AVAILABLE != 0;
    let available = ring.iter().take_while(is_available).count();
    let none = PackedLook {
        buffers: Some(Vec::new()),
        requests: Some(BTreeMap::new()),
        ..PackedLook::default()
    };
    if available == 0 && ring.iter().rev().take_while(is_available).count() != 0 {
        // The driver is in the second lap, in which the flags mean the opposite.
        let chains = ring.iter().take_while(|d| !is_available(d)).count() as u64;
        let lost = SIZE.into();
        return PackedLook {
            chains,
            lost,
            ..none
        };
    }
    if available == 0 {
        return none;
    }
    // A driver leaves zeroes where it was not.
    let is_new = bytes[16 * 7..16 * 8].iter().all(|byte| *byte == 0);
    let mut certain = is_new || is_available(&&ring[7]);
    let (mut accused, mut chains, mut all) = (false, 0, Some(Vec::new()));
    let (mut requests, mut chain, mut begin) = (BTreeMap::new(), None, 0);
    for (slot, d) in ring[..available].iter().enumerate() {
        let (more, indirect) = (d.flags & NEXT != 0, d.flags & INDIRECT != 0);
        let part = match indirect {
            false => buffer(*d).map(|buffer| vec![buffer]),
            // Where chains begin is not known for ever.
            true if more || certain && chain.is_some() => None,
            true => table(bytes, *d, true),
        };
        // A table may be gone with its chain.
        accused |= part.is_none() && (certain || !indirect);
        certain &= part.is_some();
        let part = part.as_deref();
        all = all.zip(part).map(|(all, part)| [&all, part].concat());
        let so_far = [chain.unwrap_or_default(), part.unwrap_or_default().to_vec()].concat();
        chain = more.then(|| so_far.clone());
        if !more {
            chains += 1;
            let request = (slot + 1 - begin, so_far);
            certain &= requests.insert(d.next, request).is_none();
            begin = slot + 1;
        }
    }
    PackedLook {
        chains,
        lost: 0,
        accused,
        buffers: all,
        requests: certain.then_some(requests),
    }
}

/// Bytes that the device reads and that it writes.
fn sums<'a>(buffers: impl Iterator<Item = &'a Buffer> + Clone) -> (u64, u64) {
    let bytes = |writable| {
        let buffers = buffers.clone().filter(|b| b.2 == writable);
        buffers.map(|b| u64::from(b.1)).sum()
    };
    (bytes(false), bytes(true))
}

/// What an answer to a chain with these buffers has to do with.
fn answered(buffers: &[Buffer]) -> Buffers {
    let with = |writable| buffers.iter().filter(move |b| b.1 != 0 && b.2 == writable);
    let place = |b: &Buffer| (BASE + b.0 as u64, b.1);
    Buffers {
        first_readable: with(false).next().map(place),
        first_writable: with(true).next().map(place),
        last_writable: with(true).next_back().map(place),
    }
}

/// Takes chains as long as there are any.
fn assert_agrees(bytes: &[u8], packed: bool, model: Vec<(u16, Option<Vec<Buffer>>)>) {
    let memory = memory(bytes);
    let mut queue = Queue::new(ring(packed), &memory).expect("a queue");
    for (id, buffers) in model {
        match (queue.take(&memory), buffers) {
            (Ok(Some(chain)), Some(buffers)) => {
                assert_eq!(chain.id, id);
                let taken = chain.buffers.iter();
                let taken: Vec<_> = taken.map(|b| (b.offset, b.length, b.writable)).collect();
                assert_eq!(taken, buffers);
            }
            (Err(_), None) => return,
            (taken, buffers) => panic!("{taken:?}, and the model has {buffers:?}"),
        }
    }
    assert_eq!(queue.take(&memory), Ok(None));
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn split_queue_agrees_with_the_model(bytes in region(false)) {
        assert_agrees(&bytes, false, split_chains(&bytes));
    }

    #[test]
    fn packed_queue_agrees_with_the_model(bytes in region(true)) {
        assert_agrees(&bytes, true, packed_chains(&bytes));
    }

    /// Nothing is used yet, so the newest chain of each head is certain.
    #[test]
    fn split_walker_agrees_with_the_model(bytes in region(false)) {
        let memory = memory(&bytes);
        let mut walker = Walker::new(ring(false));
        let checked = walker.check(&memory);
        let chains = split_chains(&bytes);
        let is_sound = checked.violations == 0 && checked.malformed == 0;
        prop_assert_eq!(is_sound, chains.iter().all(|(_, buffers)| buffers.is_some()));
        if is_sound {
            let heads: BTreeSet<_> = chains.iter().collect();
            let buffers = heads.iter().flat_map(|(_, buffers)| buffers).flatten();
            prop_assert_eq!((checked.bytes_readable, checked.bytes_writable), sums(buffers));
        }
    }

    /// What it keeps of the chains is what is in them, and stays so while others are used.
    #[test]
    fn packed_walker_agrees_with_the_model(bytes in region(true), backwards: bool) {
        let memory = memory(&bytes);
        let mut walker = Walker::new(ring(true));
        let checked = walker.check(&memory);
        let look = packed_look(&bytes);
        prop_assert_eq!((checked.chains, checked.lost), (look.chains, look.lost));
        prop_assert_eq!(checked.violations + checked.malformed != 0, look.accused);
        if let Some(buffers) = &look.buffers {
            prop_assert_eq!((checked.bytes_readable, checked.bytes_writable), sums(buffers.iter()));
        }
        let Some(mut requests) = look.requests else {
            prop_assert_eq!(walker.requests(&memory), None);
            return Ok(());
        };
        let mut at = 0;
        loop {
            let left = requests.iter().map(|(id, (_, buffers))| Request {
                id: *id,
                buffers: answered(buffers),
            });
            prop_assert_eq!(walker.requests(&memory), Some(left.collect()));
            let next = if backwards { requests.pop_last() } else { requests.pop_first() };
            let Some((id, (descriptors, _))) = next else { break };
            prop_assert_eq!(walker.put_used(&memory, id, 3), Some(()));
            // It is where the driver looks next (virtio 1.4, 2.8.6).
            let mut used = [0; 16];
            prop_assert_eq!(memory.read(BASE + 16 * at as u64, &mut used), Some(()));
            let used = Descriptor::at(&used, 0, true);
            prop_assert_eq!((used.next, used.len), (id, 3));
            prop_assert_eq!(used.flags & !WRITE, AVAILABLE | USED_FLAG);
            at += descriptors;
            prop_assert_eq!(walker.check(&memory).late, 0);
        }
    }

    /// Whatever the region has, and whatever it has at the next look.
    #[test]
    fn any_bytes_are_survived(
        images in vec(prop_oneof![vec(any::<u8>(), LEN), region(false), region(true)], 1..4),
        packed: bool,
    ) {
        let first = memory(&images[0]);
        let mut walker = Walker::new(ring(packed));
        let mut queue = Queue::new(ring(packed), &first).expect("a queue");
        for image in &images {
            let memory = memory(image);
            let inside = |(addr, len): (u64, u32)| memory.contains(addr, len.into());
            let checked = walker.check(&memory);
            prop_assert!(checked.chains <= SIZE.into());
            for request in walker.requests(&memory).into_iter().flatten() {
                let buffers = request.buffers;
                let all = [buffers.first_readable, buffers.first_writable, buffers.last_writable];
                prop_assert!(all.into_iter().flatten().all(inside));
            }
            // A queue that made a mistake is given up.
            for _ in 0..=SIZE {
                let Ok(Some(chain)) = queue.take(&memory) else { break };
                // No longer than the ring and a table of the whole region.
                prop_assert!(chain.buffers.len() <= usize::from(SIZE) + LEN / 16);
                let inside = |b: &swiotlb_rings::Buffer| b.offset + b.length as usize <= LEN;
                prop_assert!(chain.buffers.iter().all(inside));
            }
        }
    }

    #[test]
    fn capabilities_survive_the_bytes(bar in 0..6u8, offset: u32, length: u32, next: u8) {
        let capability = SwiotlbCapability { bar, offset, length };
        prop_assert_eq!(SwiotlbCapability::from_bytes(&capability.to_bytes(next)), Some(capability));
    }

    #[test]
    fn shared_memory_survives_the_bytes(bar in 0..6u8, id: u8, offset: u64, length: u64, next: u8) {
        let capability = SharedMemoryCapability { bar, id, offset, length };
        let read = SharedMemoryCapability::from_bytes(&capability.to_bytes(next));
        prop_assert_eq!(read, Some(capability));
    }

    #[test]
    fn any_bytes_are_shared_memory_or_none(mut bytes in vec(any::<u8>(), 0..2 * CAPABILITY64_BYTES)) {
        if let [vendor, _, _, kind, ..] = &mut bytes[..] {
            (*vendor, *kind) = (PCI_CAP_ID_VENDOR, VIRTIO_PCI_CAP_SHARED_MEMORY_CFG);
        }
        let length = CAPABILITY64_BYTES;
        let is_whole = bytes.len() >= length && usize::from(bytes[2]) >= length;
        let capability = SharedMemoryCapability::from_bytes(&bytes);
        prop_assert_eq!(capability.is_some(), is_whole && bytes[4] <= 5);
        if let Some(capability) = capability {
            bytes[2] = length as u8;
            bytes[6..8].fill(0);
            prop_assert_eq!(&capability.to_bytes(bytes[1])[..], &bytes[..length]);
        }
    }

    #[test]
    fn any_bytes_are_a_capability_or_none(mut bytes in vec(any::<u8>(), 0..2 * CAPABILITY_BYTES)) {
        if let [vendor, _, _, kind, ..] = &mut bytes[..] {
            (*vendor, *kind) = (PCI_CAP_ID_VENDOR, VIRTIO_PCI_CAP_SWIOTLB);
        }
        let is_whole = bytes.len() >= CAPABILITY_BYTES && usize::from(bytes[2]) >= CAPABILITY_BYTES;
        let capability = SwiotlbCapability::from_bytes(&bytes);
        prop_assert_eq!(capability.is_some(), is_whole && bytes[4] <= 5);
        if let Some(capability) = capability {
            // What is not read comes back as 0.
            bytes[2] = CAPABILITY_BYTES as u8;
            bytes[5..8].fill(0);
            prop_assert_eq!(&capability.to_bytes(bytes[1])[..], &bytes[..CAPABILITY_BYTES]);
        }
    }
}
