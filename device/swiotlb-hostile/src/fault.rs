// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a device, and what each fault needs of it.

use clap::ValueEnum;
use swiotlb_device::config::Dialect;
use swiotlb_device::hooks::QueueMode;

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
    /// ... a BAR that is not prefetchable, and may not be cached
    CapBarNotPrefetchable,
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
    /// The register of VIRTIO_F_DMB names an id for which there is no capability
    DmbIdAbsent,
    /// ... id 0, as the capability does, which is that of a cache for fs
    DmbIdTaken,
    /// The register of the memory type says 0, which is not coherent
    DmbNotCoherent,
    /// The common configuration ends before the registers of VIRTIO_F_DMB, says its length
    DmbNoRegisters,
    /// The shared-memory capability has 16 bytes, says its length
    DmbCapShort,
    /// ... names what lies behind the BAR, where another device's may be
    DmbCapOutside,
    /// ... names a region of 0 bytes
    DmbCapEmpty,
    /// VIRTIO_F_DMB is offered without VIRTIO_F_ACCESS_PLATFORM
    DmbNoPlatform,
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
    /// As it is written on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |v| v.get_name().into())
    }

    /// How the device has to run its queues for the fault to show.
    pub(crate) fn queue_mode(self) -> QueueMode {
        match self {
            // No backend would survive such rings.
            Fault::Scribble => QueueMode::Unserved,
            Fault::UsedWrongId
            | Fault::UsedLong
            | Fault::UsedJumps
            | Fault::UsedTwice
            | Fault::UsedOnIdleQueue
            | Fault::DescriptorsRewritten
            | Fault::DescriptorsLinked
            | Fault::IndirectRewritten
            | Fault::AvailableRewritten
            | Fault::IrqNever => QueueMode::Relayed,
            Fault::DataRewritten => QueueMode::Unchecked,
            _ => QueueMode::Checked,
        }
    }

    /// Whether the capability names bytes behind the BAR of the region.
    pub(crate) fn names_what_follows_bar(self) -> bool {
        matches!(self, Fault::CapExceedsBar | Fault::CapNextDevice)
    }

    /// Whether it is one of what only a region in a BAR has.
    pub(crate) fn needs_bar(self) -> bool {
        self.name().starts_with("cap-")
    }

    /// Whether it is one of what only a device with VIRTIO_F_DMB has.
    pub(crate) fn needs_dmb(self) -> bool {
        matches!(
            self,
            Fault::DmbIdAbsent
                | Fault::DmbIdTaken
                | Fault::DmbNotCoherent
                | Fault::DmbNoRegisters
                | Fault::DmbCapShort
                | Fault::DmbCapOutside
                | Fault::DmbCapEmpty
                | Fault::DmbNoPlatform
        )
    }

    /// Whether `--chaos` draws it for a device of this dialect.
    fn is_drawn(self, dialect: Dialect) -> bool {
        match self {
            _ if self.needs_dmb() && !dialect.has_dmb() => false,
            // They need BARs that only some devices have, or room in configuration space.
            Fault::CapBarIo
            | Fault::CapBarUnassigned
            | Fault::CapBarNotPrefetchable
            | Fault::CapTwice
            | Fault::CapMany => false,
            // No driver is rid of them again, and QEMU not of the last.
            Fault::ResetStuck | Fault::GenerationRuns | Fault::IrqStorm | Fault::CapLoop => false,
            // Two of these are enough.
            Fault::CapOverlapsNotify
            | Fault::CapOverlapsIsr
            | Fault::CapOverlapsDevice
            | Fault::CapOverlapsMsixPba => false,
            _ => true,
        }
    }
}

/// A set of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultSet(u64);

impl FaultSet {
    /// Whether the fault is in the set.
    pub fn has(self, fault: Fault) -> bool {
        self.0 & (1 << fault as u8) != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All that are in the set, in the order of [`Fault`].
    pub fn iter(self) -> impl Iterator<Item = Fault> {
        let all = Fault::value_variants().iter().copied();
        all.filter(move |fault| self.has(*fault))
    }

    /// Their names, as on the command line.
    pub fn names(self) -> Vec<String> {
        self.iter().map(Fault::name).collect()
    }

    /// The faults that `--chaos` draws from: all that a driver can be rid of again, and that
    /// need nothing but what every device of this dialect has.
    pub(crate) fn drawn(dialect: Dialect) -> Self {
        let all = Fault::value_variants().iter().copied();
        all.filter(|fault| fault.is_drawn(dialect)).collect()
    }

    /// The same for a device with a pool, which has no dialect but the first.
    pub(crate) fn drawn_in_pool() -> Self {
        let all = Self::drawn(Dialect::Swiotlb);
        all.iter().filter(|fault| !fault.needs_bar()).collect()
    }

    /// How the device has to run its queues for all of them to show.
    pub(crate) fn queue_mode(self) -> QueueMode {
        let modes = self.iter().map(Fault::queue_mode);
        modes.max().unwrap_or(QueueMode::Checked)
    }
}

impl FromIterator<Fault> for FaultSet {
    fn from_iter<I: IntoIterator<Item = Fault>>(faults: I) -> Self {
        Self(faults.into_iter().fold(0, |set, f| set | (1 << f as u8)))
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
    fn a_seed_draws_what_there_can_be() {
        let all = Fault::value_variants().iter().copied();
        let of_dmb: Vec<_> = all.filter(|fault| fault.needs_dmb()).collect();
        assert!(of_dmb.iter().all(|fault| fault.name().starts_with("dmb-")));
        assert_eq!(of_dmb.len(), 8);
        for dialect in [Dialect::Swiotlb, Dialect::Dmb, Dialect::Both] {
            let drawn = FaultSet::drawn(dialect);
            assert!(of_dmb.iter().all(|f| drawn.has(*f) == dialect.has_dmb()));
        }
    }

    #[test]
    fn the_fault_that_needs_most_says_how_queues_run() {
        let mode = |faults: &[Fault]| faults.iter().copied().collect::<FaultSet>().queue_mode();
        assert_eq!(mode(&[]), QueueMode::Checked);
        assert_eq!(mode(&[Fault::CapEmpty]), QueueMode::Checked);
        let data = Fault::DataRewritten;
        assert_eq!(mode(&[Fault::CapEmpty, data]), QueueMode::Unchecked);
        assert_eq!(mode(&[data, Fault::IrqNever]), QueueMode::Relayed);
        let all = [Fault::Scribble, data, Fault::IrqNever];
        assert_eq!(mode(&all), QueueMode::Unserved);
    }
}
