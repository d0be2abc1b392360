// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device that does not keep to the rules.
//!
//! What is wrong with it is a set of [`Fault`]s, fixed by `--fault` or drawn
//! anew at each reset from the seed of `--chaos`. The honest device asks
//! [`Faults`] at the few points where one can show: what a driver reads of
//! configuration space, registers and device configuration; interrupts, which
//! then pass by here; the region, while a driver is at work in it. Without
//! faults each of these calls does nothing.

mod config;
pub(crate) mod random;
mod ring;
mod thread;

use clap::ValueEnum;

use crate::events::Event;
use crate::pci::{Bar, ConfigSpace, BAR_COUNT};
use crate::region::{Region, RegionError};
use crate::report::Report;
use crate::ring::{Memory, RingAddresses};
use crate::virtio::{bit, F_ADMIN_VQ, F_SWIOTLB, F_VERSION_1, STATUS_FEATURES_OK};

use self::random::Random;
use self::ring::Victim;

pub use self::thread::Attack;

/// One thing that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[repr(u8)]
pub enum Fault {
    /// The SWIOTLB capability names BAR 7
    CapBarNumber,
    /// ... a BAR that the device does not have
    CapBarAbsent,
    /// ... a BAR of I/O ports
    CapBarIo,
    /// ... a BAR of 16 TiB, which no guest has room for
    CapBarUnassigned,
    /// ... a region of 0 bytes
    CapEmpty,
    /// ... offset and length whose sum has more than 32 bits
    CapWraps,
    /// ... one page more than the BAR has
    CapExceedsBar,
    /// ... what lies behind the BAR, where another device's may be
    CapNextDevice,
    /// ... a region with two ragged ends, whose whole pages can be used
    CapUnaligned,
    /// ... less than a page
    CapPartPage,
    /// ... a page
    CapOnePage,
    /// ... the common configuration structure
    CapOverlapsCommon,
    /// ... the notification structure
    CapOverlapsNotify,
    /// ... the ISR status
    CapOverlapsIsr,
    /// ... the device configuration structure
    CapOverlapsDevice,
    /// ... the MSI-X table
    CapOverlapsMsixTable,
    /// ... the MSI-X pending bits
    CapOverlapsMsixPba,
    /// The SWIOTLB capability has 8 bytes, says its length
    CapTruncated,
    /// The SWIOTLB capability is missing
    CapMissing,
    /// There are two of them, each with half of the region
    CapTwice,
    /// There are as many of them as configuration space has room for
    CapMany,
    /// The capability list is a circle. QEMU goes round in it until it dies
    CapLoop,
    /// BAR, offset and length of the capability differ at each read
    CapFlickers,
    /// Half of the region is gone as soon as a driver is bound
    RegionShrinks,
    /// The region begins elsewhere as soon as a driver is bound
    RegionMoves,
    /// The capability is gone as soon as a driver is bound
    RegionVanishes,
    /// Bit 27 is offered at every other read
    SwiotlbFlickers,
    /// Bit 27 is offered without VIRTIO_F_VERSION_1
    NoVersion1,
    /// VIRTIO_F_ADMIN_VQ is offered, and there is no such queue
    AdminQueue,
    /// FEATURES_OK never stands
    FeaturesOkDropped,
    /// Each read of the status has another value
    StatusRandom,
    /// The status is never 0: a reset does not end
    ResetStuck,
    /// Each read of config_generation has another value
    GenerationRuns,
    /// Each read of the device configuration has another value
    DeviceConfigRandom,
    /// Used entries name descriptors that the queue does not have
    UsedWrongId,
    /// Used entries say that more was written than there was room for
    UsedLong,
    /// The used index jumps
    UsedJumps,
    /// Each used entry comes twice
    UsedTwice,
    /// Used entries and interrupts of queues that were not enabled
    UsedOnIdleQueue,
    /// Descriptors are rewritten after they were used
    DescriptorsRewritten,
    /// All descriptors say that another follows
    DescriptorsLinked,
    /// Indirect tables are rewritten after they were used
    IndirectRewritten,
    /// ... and the available ring
    AvailableRewritten,
    /// A thread rewrites all of the region but the rings
    DataRewritten,
    /// A thread rewrites all of the region, and raises interrupts
    Scribble,
    /// A thread raises all interrupts
    IrqStorm,
    /// No interrupt is ever raised
    IrqNever,
    /// DEVICE_NEEDS_RESET at some moment
    NeedsReset,
}

impl Fault {
    /// Whether the capability names bytes behind the BAR of the region.
    pub fn names_what_follows_bar(self) -> bool {
        matches!(self, Fault::CapExceedsBar | Fault::CapNextDevice)
    }

    /// As it is written on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |v| v.get_name().into())
    }
}

/// A set of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultSet(u64);

impl FaultSet {
    pub fn has(self, fault: Fault) -> bool {
        self.0 & (1 << fault as u8) != 0
    }

    fn any(self, faults: &[Fault]) -> bool {
        faults.iter().any(|fault| self.has(*fault))
    }

    pub fn names(self) -> Vec<String> {
        let all = Fault::value_variants().iter();
        all.filter(|f| self.has(**f)).map(|f| f.name()).collect()
    }
}

impl FromIterator<Fault> for FaultSet {
    fn from_iter<I: IntoIterator<Item = Fault>>(faults: I) -> Self {
        Self(faults.into_iter().fold(0, |set, f| set | (1 << f as u8)))
    }
}

/// What `--chaos` draws from: all that a driver can be rid of again, and that
/// needs nothing but what every device has.
const DRAWN: &[Fault] = &[
    Fault::CapBarNumber,
    Fault::CapBarAbsent,
    Fault::CapEmpty,
    Fault::CapWraps,
    Fault::CapExceedsBar,
    Fault::CapNextDevice,
    Fault::CapUnaligned,
    Fault::CapPartPage,
    Fault::CapOnePage,
    Fault::CapOverlapsCommon,
    Fault::CapOverlapsMsixTable,
    Fault::CapTruncated,
    Fault::CapMissing,
    Fault::CapFlickers,
    Fault::RegionShrinks,
    Fault::RegionMoves,
    Fault::RegionVanishes,
    Fault::SwiotlbFlickers,
    Fault::NoVersion1,
    Fault::AdminQueue,
    Fault::FeaturesOkDropped,
    Fault::StatusRandom,
    Fault::DeviceConfigRandom,
    Fault::UsedWrongId,
    Fault::UsedLong,
    Fault::UsedJumps,
    Fault::UsedTwice,
    Fault::UsedOnIdleQueue,
    Fault::DescriptorsRewritten,
    Fault::DescriptorsLinked,
    Fault::IndirectRewritten,
    Fault::AvailableRewritten,
    Fault::DataRewritten,
    Fault::Scribble,
    Fault::IrqNever,
    Fault::NeedsReset,
];

/// The faults of the `draw`th session with this seed: three at most, in one of
/// four sessions none.
fn drawn(seed: u64, draw: u64) -> FaultSet {
    let mut random = Random::new(seed).fork(draw);
    let count = random.below(4);
    (0..count).map(|_| *random.pick(DRAWN)).collect()
}

/// Faults that need interrupts to pass by here.
const BEFORE_INTERRUPT: &[Fault] = &[
    Fault::UsedWrongId,
    Fault::UsedLong,
    Fault::UsedJumps,
    Fault::UsedTwice,
    Fault::UsedOnIdleQueue,
    Fault::DescriptorsRewritten,
    Fault::DescriptorsLinked,
    Fault::IndirectRewritten,
    Fault::AvailableRewritten,
    Fault::IrqNever,
];

/// What is to be wrong with a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultConfig {
    pub set: Vec<Fault>,
    /// The seed from which faults are drawn at each reset, instead of `set`.
    pub chaos: Option<u64>,
    /// Negotiations in which the device behaves.
    pub after: u64,
}

/// What is wrong with a device at the moment.
pub struct Faults {
    set: FaultSet,
    chaos: Option<u64>,
    draws: u64,
    /// Negotiations in which the device behaves.
    after: u64,
    active: FaultSet,
    random: Random,
    /// A driver was bound while the faults were there.
    bound: bool,
    needs_reset_in: Option<u64>,
}

impl Faults {
    pub fn new(config: &FaultConfig) -> Self {
        let mut faults = Self {
            set: config.set.iter().copied().collect(),
            chaos: config.chaos,
            draws: 0,
            after: config.after,
            active: FaultSet::default(),
            random: Random::new(config.chaos.unwrap_or_default()),
            bound: false,
            needs_reset_in: None,
        };
        if faults.after == 0 && faults.chaos.is_none() {
            faults.active = faults.set;
        }
        faults
    }

    /// A session with a driver begins, after so many negotiations.
    pub fn begin(&mut self, negotiations: u64, report: &Report) {
        if negotiations < self.after {
            return;
        }
        self.active = match self.chaos {
            None => self.set,
            Some(seed) => {
                let set = drawn(seed, self.draws);
                report.event(Event::Chaos {
                    seed,
                    draw: self.draws,
                    faults: set.names(),
                });
                self.random = Random::new(seed).fork(self.draws);
                self.draws += 1;
                self.bound = false;
                set
            }
        };
        self.needs_reset_in = Some(1 + self.random.below(100));
    }

    fn has(&self, fault: Fault) -> bool {
        self.active.has(fault)
    }

    // What a driver reads

    /// Configuration space, `data` of it from `offset` on.
    pub fn config_read(&mut self, space: &ConfigSpace, offset: u64, data: &mut [u8]) {
        if let Some(bytes) = config::view(self.active, self.bound, space, &mut self.random) {
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            for (byte, n) in data.iter_mut().zip(from..) {
                *byte = bytes.get(n).copied().unwrap_or(0xff);
            }
        }
    }

    /// What is offered.
    pub fn offer(&self, features: u64) -> u64 {
        let mut offered = features;
        if self.has(Fault::AdminQueue) {
            offered |= bit(F_ADMIN_VQ);
        }
        if self.has(Fault::NoVersion1) {
            offered &= !bit(F_VERSION_1);
        }
        offered
    }

    /// The common configuration structure; `select` is that of the features.
    pub fn common_read(&mut self, select: u32, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            match at {
                7 if select == 0 && self.has(Fault::SwiotlbFlickers) => {
                    // The last byte of the word, and bit 27 is in it.
                    if self.random.below(2) == 0 {
                        *byte &= !(bit(F_SWIOTLB) >> 24) as u8;
                    }
                }
                20 => *byte = self.status(*byte),
                21 if self.has(Fault::GenerationRuns) => *byte = self.random.next() as u8,
                _ => {}
            }
        }
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

    pub fn device_config_read(&mut self, data: &mut [u8]) {
        if self.has(Fault::DeviceConfigRandom) {
            self.random.fill(data);
        }
    }

    // While a driver is at work

    /// A driver has set FEATURES_OK, and will make its rings next. What is
    /// done to the region from now on ends when the result is dropped.
    pub fn attack(&mut self, region: &Region) -> Result<Option<Attack>, RegionError> {
        if !self.has(Fault::Scribble) {
            return Ok(None);
        }
        Ok(Some(Attack::scribble(
            region.map_again()?,
            &mut self.random,
        )))
    }

    /// The same from DRIVER_OK on; `rings` are offsets into the region.
    pub fn attack_rings(
        &mut self,
        region: &Region,
        rings: Vec<(usize, usize)>,
    ) -> Result<Option<Attack>, RegionError> {
        self.bound = true;
        if !self.has(Fault::DataRewritten) {
            return Ok(None);
        }
        let memory = region.map_again()?;
        Ok(Some(Attack::rewrite(memory, rings, &mut self.random)))
    }

    /// Whether a thread raises all interrupts. One that scribbles has the driver look at it.
    pub fn storms(&self) -> bool {
        self.active.any(&[Fault::IrqStorm, Fault::Scribble])
    }

    /// Whether a thread rewrites the rings, too.
    pub fn scribbles(&self) -> bool {
        self.has(Fault::Scribble)
    }

    /// Whether rings are no longer what a driver made of them, so that
    /// nothing can be learnt from them.
    pub fn blinds(&self) -> bool {
        self.relays() || self.active.any(&[Fault::Scribble, Fault::DataRewritten])
    }

    /// Whether interrupts are to go to [`Faults::before_interrupt`].
    pub fn relays(&self) -> bool {
        self.active.any(BEFORE_INTERRUPT)
    }

    /// The backend has used what a driver put into a queue. Whether the
    /// driver is to be told.
    pub fn before_interrupt(
        &mut self,
        memory: &Memory<'_>,
        ring: &RingAddresses,
        seen: &mut u16,
    ) -> bool {
        if !ring.packed {
            let mut victim = Victim::new(memory, ring);
            victim.rewrite(self.active, seen, &mut self.random);
        }
        !self.has(Fault::IrqNever)
    }

    /// Whether used queues are not the only ones that interrupt.
    pub fn interrupts_idle_queues(&self) -> bool {
        self.has(Fault::UsedOnIdleQueue)
    }

    /// A moment has passed. Whether the device needs a reset now.
    pub fn needs_reset(&mut self) -> bool {
        if !self.has(Fault::NeedsReset) {
            return false;
        }
        self.needs_reset_in = match self.needs_reset_in {
            Some(0) => None,
            Some(n) => Some(n - 1),
            None => return false,
        };
        self.needs_reset_in.is_none()
    }
}

/// BARs that only a device with faults has.
pub fn add_bars(faults: &[Fault], bars: &mut [Option<Bar>; BAR_COUNT]) {
    for fault in faults {
        match fault {
            Fault::CapBarIo => bars[config::IO_BAR] = Some(Bar::io(32)),
            Fault::CapBarUnassigned => {
                bars[config::HUGE_BAR] = Some(Bar {
                    size: 1 << 44,
                    wide: true,
                    prefetchable: true,
                    io: false,
                });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        let set: FaultSet = [Fault::CapBarIo, Fault::NeedsReset].into_iter().collect();
        assert_eq!(set.names(), ["cap-bar-io", "needs-reset"]);
        assert_eq!(Fault::from_str("no-version1", false), Ok(Fault::NoVersion1));
    }

    #[test]
    fn all_fit_into_a_set() {
        let all = Fault::value_variants();
        assert!(all.len() <= 64);
        let set: FaultSet = all.iter().copied().collect();
        assert_eq!(set.names().len(), all.len());
    }

    #[test]
    fn a_seed_always_draws_the_same() {
        let session = |seed| (0..50).map(|n| drawn(seed, n)).collect::<Vec<_>>();
        assert_eq!(session(1), session(1));
        assert_ne!(session(1), session(2));
        let every: FaultSet = (0..1000)
            .flat_map(|n| {
                let set = drawn(7, n);
                DRAWN.iter().copied().filter(move |f| set.has(*f))
            })
            .collect();
        assert_eq!(every, DRAWN.iter().copied().collect());
    }

    #[test]
    fn needs_reset_once_a_session() {
        let mut faults = Faults {
            set: FaultSet::default(),
            chaos: None,
            draws: 0,
            after: 0,
            active: [Fault::NeedsReset].into_iter().collect(),
            random: Random::new(3),
            bound: false,
            needs_reset_in: Some(5),
        };
        let times = (0..1000).filter(|_| faults.needs_reset()).count();
        assert_eq!(times, 1);
    }
}
