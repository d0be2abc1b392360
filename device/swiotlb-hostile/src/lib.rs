// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device that does not keep to the rules, for tests of a guest.
//!
//! What is wrong with it is a set of [`Fault`]s, given or drawn anew at each reset
//! ([`Plan`]). [`Hostile`] is the [`Hooks`] of such a device. See README.md.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod capability;
mod fault;
mod random;
mod ring;
mod thread;

use std::ops::Range;

use clap::Args;
use serde_json::{json, Value};
use swiotlb_device::config::DeviceConfig;
use swiotlb_device::hooks::{Hooks, Interrupt, QueueMode};
use swiotlb_device::pci::{ConfigSpace, Layout, REGION_SHM_ID};
use swiotlb_device::region::Region;
use swiotlb_device::ring::{Memory, RingAddresses};
use swiotlb_device::virtio::{
    bit, DMB_MEMORY_TYPE, DMB_SHM_ID, F_ACCESS_PLATFORM, F_ADMIN_VQ, F_SWIOTLB, F_VERSION_1,
    STATUS_FEATURES_OK,
};
use thiserror::Error;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::capability::TAKEN_SHM_ID;
use crate::random::Random;
use crate::ring::Victim;
use crate::thread::Attack;

pub use crate::fault::{Fault, FaultSet};

/// What is to be wrong with a device.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What is wrong with the device (more than one with commas)
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    pub fault: Vec<Fault>,

    /// At each reset draw anew what is wrong; the same seed draws the same
    #[arg(long, value_name = "SEED", conflicts_with = "fault")]
    pub chaos: Option<u64>,

    /// Be a good device until a driver has set FEATURES_OK so many times
    #[arg(long, value_name = "N", default_value = "0")]
    pub fault_after: u64,
}

/// Why a device cannot have what is planned.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    /// A capability has 32 bits, and cannot name what lies behind the BAR.
    #[error("--fault {0} needs a region that ends within the first 2G of its BAR")]
    Fault(String),
    /// It is one of VIRTIO_F_DMB, which the device does not have.
    #[error("--fault {0} needs --dialect dmb or both")]
    Dialect(String),
    /// It is one of the capability or the BAR of a region, of which a pool has none.
    #[error("--fault {0} needs a region in a BAR, not a --pool")]
    Pool(String),
    /// The same as [`PlanError::Fault`], for faults that may be drawn.
    #[error("--chaos needs a region that ends within the first 2G of its BAR")]
    Chaos,
}

impl Plan {
    fn validate(&self, device: &DeviceConfig) -> Result<(), PlanError> {
        let mut faults = self.fault.iter();
        match faults.find(|fault| fault.needs_dmb()) {
            Some(fault) if !device.dialect.has_dmb() => {
                return Err(PlanError::Dialect(fault.name()));
            }
            _ => {}
        }
        let mut faults = self.fault.iter();
        match faults.find(|fault| fault.needs_bar()) {
            Some(fault) if device.pool.is_some() => return Err(PlanError::Pool(fault.name())),
            _ => {}
        }
        let bar = device.bounce_bar_size().filter(|_| device.capability);
        if bar.is_none_or(|bytes| bytes < 1 << 32) {
            return Ok(());
        }
        let mut faults = self.fault.iter();
        match faults.find(|fault| fault.names_what_follows_bar()) {
            Some(fault) => Err(PlanError::Fault(fault.name())),
            None if self.chaos.is_some() => Err(PlanError::Chaos),
            None => Ok(()),
        }
    }
}

/// A device with faults.
pub struct Hostile {
    plan: Plan,
    /// Those of which `--chaos` draws some.
    drawn: FaultSet,
    /// Sessions with faults so far.
    sessions: u64,
    /// The faults of this session.
    active: FaultSet,
    random: Random,
    /// A driver was bound while the faults were there.
    bound: bool,
    /// Looks until DEVICE_NEEDS_RESET is set.
    needs_reset_in: Option<u64>,
    /// Until the session ends.
    threads: Vec<Attack>,
}

impl Hostile {
    /// Faults for this device.
    pub fn new(plan: Plan, device: &DeviceConfig) -> Result<Self, PlanError> {
        plan.validate(device)?;
        Ok(Self {
            drawn: match device.pool {
                None => FaultSet::drawn(device.dialect),
                Some(_) => FaultSet::drawn_in_pool(),
            },
            sessions: 0,
            active: FaultSet::default(),
            random: Random::new(plan.chaos.unwrap_or_default()),
            bound: false,
            needs_reset_in: None,
            threads: Vec::new(),
            plan,
        })
    }

    fn has(&self, fault: Fault) -> bool {
        self.active.has(fault)
    }

    fn status(&mut self, mut status: u8) -> u8 {
        if self.has(Fault::FeaturesOkDropped) {
            status &= !STATUS_FEATURES_OK;
        }
        if self.has(Fault::StatusRandom) && self.random.below(2) == 0 {
            status = self.random.next() as u8;
        }
        if self.has(Fault::ResetStuck) && status == 0 {
            status = 1;
        }
        status
    }

    /// Starts a thread that writes into the region.
    fn write_region(
        &mut self,
        region: &Region,
        start: impl FnOnce(MmapRegion, &mut Random) -> Attack,
    ) {
        match region.map_again() {
            Ok(memory) => self.threads.push(start(memory, &mut self.random)),
            Err(error) => log::error!("no attack: {error}"),
        }
    }
}

/// The faults of a session with this seed: three of these at most, in one of four sessions none.
fn drawn(from: FaultSet, seed: u64, session: u64) -> FaultSet {
    let from: Vec<_> = from.iter().collect();
    let mut random = Random::new(seed).fork(session);
    let count = random.below(4);
    (0..count).map(|_| *random.pick(&from)).collect()
}

impl Hooks for Hostile {
    fn layout(&mut self, layout: &mut Layout) {
        capability::change_bars(&self.plan.fault, &mut layout.bars);
    }

    fn on_session(&mut self, negotiations: u64) -> Option<Value> {
        self.threads.clear();
        if negotiations < self.plan.fault_after {
            return None;
        }
        let session = self.sessions;
        self.sessions += 1;
        self.active = match self.plan.chaos {
            None => self.plan.fault.iter().copied().collect(),
            Some(seed) => {
                self.random = Random::new(seed).fork(session);
                self.bound = false;
                drawn(self.drawn, seed, session)
            }
        };
        self.needs_reset_in = Some(1 + self.random.below(100));
        let (seed, faults) = (self.plan.chaos, self.active.names());
        Some(json!({ "session": session, "seed": seed, "faults": faults }))
    }

    fn features_to_offer(&self, features: u64) -> u64 {
        let mut offered = features;
        if self.has(Fault::AdminQueue) {
            offered |= bit(F_ADMIN_VQ);
        }
        if self.has(Fault::NoVersion1) {
            offered &= !bit(F_VERSION_1);
        }
        if self.has(Fault::DmbNoPlatform) {
            offered &= !bit(F_ACCESS_PLATFORM);
        }
        offered
    }

    fn on_config_space_read(&mut self, space: &ConfigSpace, offset: u64, data: &mut [u8]) {
        if let Some(bytes) = capability::view(self.active, self.bound, space, &mut self.random) {
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            for (byte, n) in data.iter_mut().zip(from..) {
                *byte = bytes.get(n).copied().unwrap_or(0xff);
            }
        }
    }

    fn on_common_read(&mut self, feature_select: u32, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            match at {
                7 if feature_select == 0 && self.has(Fault::SwiotlbFlickers) => {
                    // The last byte of the word, and bit 27 is in it.
                    if self.random.below(2) == 0 {
                        *byte &= !(bit(F_SWIOTLB) >> 24) as u8;
                    }
                }
                20 => *byte = self.status(*byte),
                21 if self.has(Fault::GenerationRuns) => *byte = self.random.next() as u8,
                DMB_SHM_ID if self.has(Fault::DmbIdAbsent) => *byte = !REGION_SHM_ID,
                DMB_SHM_ID if self.has(Fault::DmbIdTaken) => *byte = TAKEN_SHM_ID,
                DMB_MEMORY_TYPE if self.has(Fault::DmbNotCoherent) => *byte = 0,
                _ => {}
            }
        }
    }

    fn on_device_config_read(&mut self, data: &mut [u8]) {
        if self.has(Fault::DeviceConfigRandom) {
            self.random.fill(data);
        }
    }

    fn on_features_ok(&mut self, region: &Region) {
        if self.has(Fault::Scribble) {
            self.write_region(region, Attack::scribble);
        }
    }

    fn on_driver_ok(
        &mut self,
        region: &Region,
        rings: &[Range<usize>],
        vectors: &[Option<EventFd>],
    ) {
        self.bound = true;
        if self.has(Fault::DataRewritten) {
            self.write_region(region, |memory, random| {
                Attack::rewrite(memory, rings.to_vec(), random)
            });
        }
        // Interrupts have the driver look at what is scribbled.
        if self.has(Fault::IrqStorm) || self.has(Fault::Scribble) {
            let vectors = vectors.iter().flatten();
            let vectors = vectors.filter_map(|fd| fd.try_clone().ok());
            self.threads.push(Attack::storm(vectors.collect()));
        }
    }

    fn on_pool_gone(&mut self) {
        self.threads.clear();
    }

    fn queue_mode(&self) -> QueueMode {
        self.active.queue_mode()
    }

    fn before_interrupt(
        &mut self,
        memory: &Memory<'_>,
        ring: &RingAddresses,
        seen: &mut u16,
    ) -> Interrupt {
        if !ring.packed {
            let mut victim = Victim::new(memory, ring);
            victim.rewrite(self.active, seen, &mut self.random);
        }
        if self.has(Fault::IrqNever) {
            Interrupt::None
        } else if self.has(Fault::UsedOnIdleQueue) {
            Interrupt::All
        } else {
            Interrupt::Queue
        }
    }

    fn needs_reset(&mut self) -> Option<&'static str> {
        if !self.has(Fault::NeedsReset) {
            return None;
        }
        self.needs_reset_in = self.needs_reset_in?.checked_sub(1);
        match self.needs_reset_in {
            None => Some("a fault that was asked for"),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiotlb_device::config::Dialect;
    use swiotlb_device::types;

    const G: u64 = 1 << 30;

    fn device(region_size: u64) -> DeviceConfig {
        let mut device = DeviceConfig::new(types::lookup("blk").expect("a type"));
        device.region_size = region_size;
        device
    }

    fn fixed(fault: Fault) -> Plan {
        Plan {
            fault: vec![fault],
            ..Plan::default()
        }
    }

    #[test]
    fn a_pool_has_no_faults_of_a_bar() {
        let mut pool = device(16 << 20);
        (pool.pool, pool.capability) = (Some(G), false);
        let refused = Hostile::new(fixed(Fault::CapBarIo), &pool).err();
        assert_eq!(refused, Some(PlanError::Pool("cap-bar-io".into())));
        let hostile = Hostile::new(fixed(Fault::Scribble), &pool).expect("a plan");
        assert!(hostile.drawn.has(Fault::Scribble));
        assert!(hostile.drawn.iter().all(|fault| !fault.needs_bar()));
    }

    #[test]
    fn a_seed_always_draws_the_same() {
        for dialect in [Dialect::Swiotlb, Dialect::Dmb] {
            let from = FaultSet::drawn(dialect);
            let session = |seed| (0..50).map(|n| drawn(from, seed, n)).collect::<Vec<_>>();
            assert_eq!(session(1), session(1));
            assert_ne!(session(1), session(2));
            let every: FaultSet = (0..1000).flat_map(|n| drawn(from, 7, n).iter()).collect();
            assert_eq!(every, from);
        }
    }

    #[test]
    fn needs_reset_once_a_session() {
        let mut hostile = Hostile::new(fixed(Fault::NeedsReset), &device(G)).expect("a plan");
        for session in 0..3 {
            hostile.on_session(session);
            let times = (0..1000).filter(|_| hostile.needs_reset().is_some());
            assert_eq!(times.count(), 1);
        }
    }

    #[test]
    fn it_is_good_for_so_many_negotiations() {
        let plan = Plan {
            fault_after: 2,
            ..fixed(Fault::NoVersion1)
        };
        let mut hostile = Hostile::new(plan, &device(G)).expect("a plan");
        let offers: Vec<_> = (0..4)
            .map(|negotiations| {
                hostile.on_session(negotiations);
                hostile.features_to_offer(bit(F_VERSION_1)) != 0
            })
            .collect();
        assert_eq!(offers, [true, true, false, false]);
    }

    /// What a driver reads of the registers of VIRTIO_F_DMB, id and memory type.
    fn dmb_registers(fault: Fault) -> (u8, u8) {
        let mut device = device(G);
        device.dialect = Dialect::Dmb;
        let mut hostile = Hostile::new(fixed(fault), &device).expect("a plan");
        hostile.on_session(0);
        let mut data = [REGION_SHM_ID, 0, 1, 0];
        hostile.on_common_read(0, DMB_SHM_ID, &mut data);
        assert_eq!((data[1], data[3]), (0, 0));
        (data[0], data[2])
    }

    #[test]
    fn registers_of_dmb() {
        assert_eq!(dmb_registers(Fault::IrqNever), (REGION_SHM_ID, 1));
        assert_eq!(dmb_registers(Fault::DmbIdTaken), (0, 1));
        assert_eq!(dmb_registers(Fault::DmbNotCoherent), (REGION_SHM_ID, 0));
        assert_eq!(dmb_registers(Fault::DmbIdAbsent), (127, 1));
    }

    #[test]
    fn dmb_without_what_it_needs() {
        let mut device = device(G);
        let dmb = bit(F_VERSION_1) | bit(44);
        let refused = Err(PlanError::Dialect("dmb-no-platform".into()));
        assert_eq!(fixed(Fault::DmbNoPlatform).validate(&device), refused);
        device.dialect = Dialect::Both;
        let plan = fixed(Fault::DmbNoPlatform);
        let mut hostile = Hostile::new(plan, &device).expect("a plan");
        hostile.on_session(0);
        assert_eq!(hostile.features_to_offer(dmb | bit(F_ACCESS_PLATFORM)), dmb);
    }

    #[test]
    fn what_follows_a_bar_can_be_named() {
        let check = |plan: Plan, bytes| plan.validate(&device(bytes));
        for fault in [Fault::CapNextDevice, Fault::CapExceedsBar] {
            let refused = Err(PlanError::Fault(fault.name()));
            assert_eq!(check(fixed(fault), 4 * G), refused);
            assert_eq!(check(fixed(fault), 2 * G + 4096), refused);
            assert_eq!(check(fixed(fault), 2 * G), Ok(()));
        }
        let chaos = || Plan {
            chaos: Some(1),
            ..Plan::default()
        };
        assert_eq!(check(chaos(), 4 * G), Err(PlanError::Chaos));
        assert_eq!(check(chaos(), 2 * G), Ok(()));
        assert_eq!(check(fixed(Fault::CapEmpty), 4 * G), Ok(()));
    }
}
