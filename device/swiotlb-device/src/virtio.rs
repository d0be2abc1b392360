// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The common configuration structure (virtio 1.4, 4.1.4.3) and the state
//! machine behind it. Pure: register accesses in, [`Effect`]s out; carrying
//! them out is the caller's business. With virtio-mmio, [`mmio`](crate::mmio) says which
//! access a register stands for.

use swiotlb_rings::DMB_MEMORY_COHERENT;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

use crate::config::Dialect;
use crate::pci::REGION_SHM_ID;

// Feature bits (virtio 1.4, 6), that of the proposal, and that of its successor.
pub use swiotlb_rings::{
    VIRTIO_F_DMB as F_DMB, VIRTIO_F_SWIOTLB as F_SWIOTLB, VIRTIO_F_VERSION_1 as F_VERSION_1,
};
// The registers of the latter.
pub use swiotlb_rings::{
    VIRTIO_PCI_COMMON_DMB_MEMORY_TYPE as DMB_MEMORY_TYPE,
    VIRTIO_PCI_COMMON_DMB_SHM_ID as DMB_SHM_ID,
};
pub use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM as F_ACCESS_PLATFORM, VIRTIO_F_ADMIN_VQ as F_ADMIN_VQ,
    VIRTIO_F_ORDER_PLATFORM as F_ORDER_PLATFORM, VIRTIO_F_RING_PACKED as F_RING_PACKED,
    VIRTIO_F_RING_RESET as F_RING_RESET,
};
pub use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX as F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC as F_INDIRECT_DESC,
};

/// VHOST_USER_F_PROTOCOL_FEATURES, which no driver sees.
pub const F_PROTOCOL_FEATURES: u32 = 30;

/// Device status DRIVER_OK (virtio 1.4, 2.1).
pub const STATUS_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Device status FEATURES_OK (virtio 1.4, 2.1).
pub const STATUS_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// Device status DEVICE_NEEDS_RESET (virtio 1.4, 2.1).
pub const STATUS_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// No vector is assigned.
pub const NO_VECTOR: u16 = 0xffff;

/// The mask of a feature bit.
pub const fn bit(number: u32) -> u64 {
    1 << number
}

/// The numbers of the bits that are set.
pub fn bits(features: u64) -> Vec<u32> {
    (0..64).filter(|n| features & bit(*n) != 0).collect()
}

/// What of the backend's offer reaches the guest: what device types have for themselves
/// (virtio 1.4, 2.2: 0 to 23, and from 50 on, of which vhost-user has those up to 63), and
/// of the rest what is between driver and backend. What is the device's own to offer, what
/// concerns the two of us only (30), and what nobody here knows is not among it. IN_ORDER is
/// not, for with it one used element may stand for many chains, where
/// [`Walker`](crate::ring::Walker) goes by one for each.
const PASSED: u64 = (bit(24) - 1)
    | !(bit(50) - 1)
    | bit(F_INDIRECT_DESC)
    | bit(F_EVENT_IDX)
    | bit(F_VERSION_1)
    | bit(F_RING_PACKED)
    | bit(F_ORDER_PLATFORM);

/// The offers that are the device's own to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Offered, whatever the backend offers, which is not told of them.
    pub added: u64,
    /// Not offered, whatever the backend offers.
    pub hidden: u64,
    /// Whether VIRTIO_F_SWIOTLB is offered if the dialect has it.
    pub swiotlb: bool,
    /// Whether VIRTIO_F_ACCESS_PLATFORM is offered also without VIRTIO_F_DMB, which needs it.
    pub access_platform: bool,
    /// Whether VIRTIO_F_RING_PACKED is offered if the backend has it.
    pub packed: bool,
    /// Whether VIRTIO_F_INDIRECT_DESC is offered if the backend has it.
    pub indirect: bool,
    /// Whether VIRTIO_F_EVENT_IDX is offered if the backend has it.
    pub event_idx: bool,
}

impl Offer {
    /// What the device itself has to offer, whatever the backend offers.
    pub fn own(&self, dialect: Dialect) -> u64 {
        let mut features = 0;
        if self.swiotlb && dialect.has_swiotlb() {
            features |= bit(F_SWIOTLB);
        }
        if dialect.has_dmb() {
            features |= bit(F_DMB) | bit(F_ACCESS_PLATFORM);
        }
        if self.access_platform {
            features |= bit(F_ACCESS_PLATFORM);
        }
        features
    }

    /// What the guest is offered when the backend offers `backend`.
    pub fn features(&self, dialect: Dialect, backend: u64) -> u64 {
        let mut features = backend & PASSED | self.own(dialect);
        if !self.packed {
            features &= !bit(F_RING_PACKED);
        }
        if !self.indirect {
            features &= !bit(F_INDIRECT_DESC);
        }
        if !self.event_idx {
            features &= !bit(F_EVENT_IDX);
        }
        features & !self.hidden | self.added
    }
}

/// What a backend that offers `offered` is told of what the guest accepted.
pub fn backend_features(accepted: u64, offered: u64) -> u64 {
    accepted & offered & PASSED
}

/// What the guest accepted and a backend cannot do that offers `offered`, as another one
/// did when the guest was asked. `added` is nobody's but the device's.
pub fn lost_features(accepted: u64, added: u64, offered: u64) -> u64 {
    accepted & PASSED & !(added | offered)
}

/// Why FEATURES_OK is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The driver accepted a feature that it was not offered.
    NotOffered,
    /// The driver did not accept VIRTIO_F_VERSION_1.
    NoVersion1,
    /// The driver did not accept VIRTIO_F_SWIOTLB, which is required.
    NoSwiotlb,
    /// The driver did not accept VIRTIO_F_DMB, which is required.
    NoDmb,
    /// The driver accepted neither VIRTIO_F_SWIOTLB nor VIRTIO_F_DMB, one of which is required.
    NoDialect,
    /// The driver accepted both VIRTIO_F_SWIOTLB and VIRTIO_F_DMB.
    TwoDialects,
    /// The driver accepted VIRTIO_F_DMB without VIRTIO_F_ACCESS_PLATFORM.
    DmbNoPlatform,
    /// The driver accepted VIRTIO_F_DMB without VIRTIO_F_ORDER_PLATFORM, which was offered.
    DmbNoOrder,
}

impl Refusal {
    /// The reason, for the report.
    pub fn text(self) -> &'static str {
        match self {
            Refusal::NotOffered => "a feature was accepted that was not offered",
            Refusal::NoVersion1 => "VIRTIO_F_VERSION_1 was not accepted",
            Refusal::NoSwiotlb => "VIRTIO_F_SWIOTLB was not accepted, and it is required",
            Refusal::NoDmb => "VIRTIO_F_DMB was not accepted, and it is required",
            Refusal::NoDialect => {
                "neither VIRTIO_F_SWIOTLB nor VIRTIO_F_DMB was accepted, and one is required"
            }
            Refusal::TwoDialects => "both VIRTIO_F_SWIOTLB and VIRTIO_F_DMB were accepted",
            Refusal::DmbNoPlatform => "VIRTIO_F_DMB was accepted without VIRTIO_F_ACCESS_PLATFORM",
            Refusal::DmbNoOrder => {
                "VIRTIO_F_DMB was accepted without VIRTIO_F_ORDER_PLATFORM, which was offered"
            }
        }
    }
}

/// What a register access asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver asked for a reset; the registers have been reset.
    Reset,
    /// The driver set FEATURES_OK.
    Features(Result<(), Refusal>),
    /// The driver set DRIVER_OK.
    DriverOk,
    /// This queue is to stop: the driver reset it, and its registers have been reset; or the
    /// driver disabled it.
    QueueReset(u16),
    /// This queue was enabled after DRIVER_OK, as is done after its reset.
    QueueEnabled(u16),
    /// A vector was assigned: of this queue, or of configuration changes.
    Vector(Option<u16>),
}

/// The registers of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// The number of descriptors.
    pub size: u16,
    /// The MSI-X vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// Whether the driver has enabled the queue.
    pub enabled: bool,
    /// Descriptor table or ring.
    pub desc: u64,
    /// Available ring or driver event suppression.
    pub driver: u64,
    /// Used ring or device event suppression.
    pub device: u64,
}

/// What the machine needs to know of its device.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The features that the device offers.
    pub offered: u64,
    /// Whether there are the registers of VIRTIO_F_DMB, and which feature FEATURES_OK may need.
    pub dialect: Dialect,
    /// FEATURES_OK needs a feature of the dialect.
    pub required: bool,
    /// The number of queues.
    pub queues: u16,
    /// The largest size of a queue.
    pub queue_size: u16,
    /// The number of MSI-X vectors.
    pub vectors: u16,
    /// The vector of queues and configuration changes for as long as the driver has not
    /// assigned one: [`NO_VECTOR`] if it is to.
    pub vector: u16,
}

/// The registers, and where the driver is in its negotiation.
#[derive(Debug)]
pub struct Registers {
    rules: Rules,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Queue {
    fn new(rules: &Rules) -> Self {
        Self {
            size: rules.queue_size,
            vector: rules.vector,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }
}

impl Registers {
    /// The registers as after power-on.
    pub fn new(rules: Rules) -> Self {
        let queue = Queue::new(&rules);
        Self {
            rules,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: rules.vector,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: vec![queue; usize::from(rules.queues)],
        }
    }

    /// As after power-on. A new offer takes effect here and nowhere else (R18).
    pub fn reset(&mut self, offered: u64) {
        let generation = self.generation;
        self.rules.offered = offered;
        *self = Self::new(self.rules);
        self.generation = generation;
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        self.rules.offered
    }

    /// The features that the driver accepted.
    pub fn accepted(&self) -> u64 {
        self.driver_features
    }

    /// Whether the driver accepted the feature with this bit number.
    pub fn has(&self, feature: u32) -> bool {
        self.driver_features & bit(feature) != 0
    }

    /// Which half of the offered features the driver reads.
    pub fn device_feature_select(&self) -> u32 {
        self.device_feature_select
    }

    /// The registers of all queues.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// The MSI-X vector of configuration changes, or [`NO_VECTOR`].
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The largest size of the queue that is selected; 0 if there is no such queue.
    pub fn queue_size_max(&self) -> u16 {
        self.queue().map_or(0, |_| self.rules.queue_size)
    }

    /// Sets DEVICE_NEEDS_RESET.
    pub fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// The device configuration space has changed.
    pub fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The value of the field at `offset`, and where that field begins.
    fn field(&self, offset: u64) -> (u64, u64) {
        let queue = self.queue();
        let of = |pick: fn(&Queue) -> u64| queue.map_or(0, pick);
        match offset {
            0..=3 => (0, u64::from(self.device_feature_select)),
            4..=7 => (4, half(self.rules.offered, self.device_feature_select)),
            8..=11 => (8, u64::from(self.driver_feature_select)),
            12..=15 => (12, half(self.driver_features, self.driver_feature_select)),
            16..=17 => (16, u64::from(self.config_vector)),
            18..=19 => (18, u64::from(self.rules.queues)),
            20 => (20, u64::from(self.status)),
            21 => (21, u64::from(self.generation)),
            22..=23 => (22, u64::from(self.queue_select)),
            24..=25 => (24, of(|q| q.size.into())),
            26..=27 => (26, queue.map_or(NO_VECTOR, |q| q.vector).into()),
            28..=29 => (28, of(|q| q.enabled.into())),
            30..=31 => (30, self.queue_select.into()),
            32..=39 => (32, of(|q| q.desc)),
            40..=47 => (40, of(|q| q.driver)),
            48..=55 => (48, of(|q| q.device)),
            DMB_SHM_ID..=0x41 if self.rules.dialect.has_dmb() => (DMB_SHM_ID, REGION_SHM_ID.into()),
            DMB_MEMORY_TYPE..=0x43 if self.rules.dialect.has_dmb() => {
                (DMB_MEMORY_TYPE, DMB_MEMORY_COHERENT.into())
            }
            // A reset of a queue is over when the write returns, so queue_reset
            // reads as 0. queue_notify_data and admin queues: not offered.
            _ => (offset, 0),
        }
    }

    /// Reads registers from `offset` on; bytes between registers are 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(n as u64);
            let (start, value) = self.field(at);
            *byte = value
                .to_le_bytes()
                .get((at - start) as usize)
                .copied()
                .unwrap_or(0);
        }
    }

    /// A write of a width that the field does not allow has no effect.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if data.len() > 8 {
            return Effect::None;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            (12, 4) => self.write_features(value as u32),
            (16, 2) => {
                self.config_vector = self.usable_vector(value as u16);
                return Effect::Vector(None);
            }
            (20, 1) => return self.write_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (26, 2) => {
                let vector = self.usable_vector(value as u16);
                let index = self.queue_select;
                if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                    queue.vector = vector;
                    return Effect::Vector(Some(index));
                }
            }
            (24..=55, _) => return self.write_queue(offset, data.len(), value),
            (58, 2) if value == 1 => return self.reset_queue(),
            _ => {}
        }
        Effect::None
    }

    fn usable_vector(&self, vector: u16) -> u16 {
        if vector < self.rules.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn write_features(&mut self, value: u32) {
        // After FEATURES_OK they stand (virtio 1.4, 3.1.1).
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | (value << 32),
            _ => {}
        }
    }

    fn reset_queue(&mut self) -> Effect {
        let fresh = Queue::new(&self.rules);
        let negotiated = self.has(F_RING_RESET);
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) if negotiated => *queue = fresh,
            _ => return Effect::None,
        }
        Effect::QueueReset(self.queue_select)
    }

    /// Disables the queue that is selected, which a driver can do with virtio-mmio only.
    pub fn disable_queue(&mut self) -> Effect {
        let is_started = self.status & STATUS_DRIVER_OK != 0;
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) if queue.enabled => queue.enabled = false,
            _ => return Effect::None,
        }
        match is_started {
            true => Effect::QueueReset(self.queue_select),
            false => Effect::None,
        }
    }

    fn write_queue(&mut self, offset: u64, width: usize, value: u64) -> Effect {
        let limit = self.rules.queue_size;
        let packed = self.has(F_RING_PACKED);
        let running = self.status & STATUS_DRIVER_OK != 0 && self.has(F_RING_RESET);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Effect::None;
        };
        // A queue that is enabled cannot be moved.
        if queue.enabled {
            return Effect::None;
        }
        let address = match offset {
            32..=39 => &mut queue.desc,
            40..=47 => &mut queue.driver,
            48..=55 => &mut queue.device,
            24 if width == 2 => {
                let size = value as u16;
                if size != 0 && size <= limit && (packed || size.is_power_of_two()) {
                    queue.size = size;
                }
                return Effect::None;
            }
            28 if width == 2 => {
                queue.enabled = value == 1;
                if queue.enabled && running {
                    return Effect::QueueEnabled(self.queue_select);
                }
                return Effect::None;
            }
            _ => return Effect::None,
        };
        match (offset % 8, width) {
            (0, 8) => *address = value,
            (0, 4) => *address = *address & !0xffff_ffff | value,
            (4, 4) => *address = *address & 0xffff_ffff | (value << 32),
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            let offered = self.rules.offered;
            self.reset(offered);
            return Effect::Reset;
        }
        // Bits are only ever added, and NEEDS_RESET is the device's own.
        let new = value & !self.status & !STATUS_NEEDS_RESET;
        if new & STATUS_FEATURES_OK != 0 {
            self.status |= new & !STATUS_FEATURES_OK & !STATUS_DRIVER_OK;
            let verdict = self.judge();
            if verdict.is_ok() {
                self.status |= STATUS_FEATURES_OK;
            }
            return Effect::Features(verdict);
        }
        let mut new = new;
        if self.status & STATUS_FEATURES_OK == 0 {
            new &= !STATUS_DRIVER_OK;
        }
        self.status |= new;
        if new & STATUS_DRIVER_OK != 0 {
            return Effect::DriverOk;
        }
        Effect::None
    }

    fn judge(&self) -> Result<(), Refusal> {
        if self.driver_features & !self.rules.offered != 0 {
            return Err(Refusal::NotOffered);
        }
        // Legacy ANY_LAYOUT is the same bit: it counts with VERSION_1 only (R12).
        if !self.has(F_VERSION_1) {
            return Err(Refusal::NoVersion1);
        }
        let (swiotlb, dmb) = (self.has(F_SWIOTLB), self.has(F_DMB));
        if swiotlb && dmb {
            return Err(Refusal::TwoDialects);
        }
        if dmb && !self.has(F_ACCESS_PLATFORM) {
            return Err(Refusal::DmbNoPlatform);
        }
        let order = self.rules.offered & bit(F_ORDER_PLATFORM) != 0;
        if dmb && order && !self.has(F_ORDER_PLATFORM) {
            return Err(Refusal::DmbNoOrder);
        }
        if self.rules.required && !swiotlb && !dmb {
            return Err(match self.rules.dialect {
                Dialect::Swiotlb => Refusal::NoSwiotlb,
                Dialect::Dmb => Refusal::NoDmb,
                Dialect::Both => Refusal::NoDialect,
            });
        }
        Ok(())
    }
}

fn half(value: u64, select: u32) -> u64 {
    match select {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = bit(F_VERSION_1) | bit(F_SWIOTLB) | bit(9);

    fn registers(required: bool) -> Registers {
        registers_of(Dialect::Swiotlb, OFFERED, required)
    }

    fn registers_of(dialect: Dialect, offered: u64, required: bool) -> Registers {
        Registers::new(Rules {
            offered,
            dialect,
            required,
            queues: 2,
            queue_size: 256,
            vectors: 3,
            vector: NO_VECTOR,
        })
    }

    fn read(r: &Registers, at: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        r.read(at, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    fn accept(r: &mut Registers, features: u64) -> Effect {
        r.write(20, &[1]);
        r.write(20, &[3]);
        for select in 0..2u32 {
            r.write(8, &select.to_le_bytes());
            r.write(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        r.write(20, &[11])
    }

    #[test]
    fn offer_reads_in_halves() {
        let mut r = registers(true);
        assert_eq!(read(&r, 4, 4), OFFERED & 0xffff_ffff);
        r.write(0, &1u32.to_le_bytes());
        assert_eq!(read(&r, 4, 4), OFFERED >> 32);
        r.write(0, &2u32.to_le_bytes());
        assert_eq!(read(&r, 4, 4), 0);
    }

    #[test]
    fn required_wants_the_bit() {
        let mut r = registers(true);
        let effect = accept(&mut r, bit(F_VERSION_1));
        assert_eq!(effect, Effect::Features(Err(Refusal::NoSwiotlb)));
        assert_eq!(read(&r, 20, 1), 3);
        assert_eq!(
            r.write(20, &[15]),
            Effect::Features(Err(Refusal::NoSwiotlb))
        );
        assert_eq!(read(&r, 20, 1), 3, "no DRIVER_OK on the back of a refusal");
    }

    /// Offered by a device with VIRTIO_F_DMB.
    const DMB: u64 = bit(F_VERSION_1) | bit(F_DMB) | bit(F_ACCESS_PLATFORM);

    #[test]
    fn required_wants_a_bit_of_the_dialect() {
        let platform = bit(F_VERSION_1) | bit(F_ACCESS_PLATFORM);
        for (dialect, offered, refusal) in [
            (Dialect::Dmb, DMB, Refusal::NoDmb),
            (Dialect::Both, DMB | bit(F_SWIOTLB), Refusal::NoDialect),
        ] {
            let mut r = registers_of(dialect, offered, true);
            let effect = accept(&mut r, platform);
            assert_eq!(effect, Effect::Features(Err(refusal)));
            let mut r = registers_of(dialect, offered, true);
            assert_eq!(accept(&mut r, DMB), Effect::Features(Ok(())));
        }
        let mut r = registers_of(Dialect::Both, DMB | bit(F_SWIOTLB), true);
        let swiotlb = bit(F_VERSION_1) | bit(F_SWIOTLB);
        assert_eq!(accept(&mut r, swiotlb), Effect::Features(Ok(())));
    }

    #[test]
    fn dmb_is_not_accepted_alone() {
        let offered = DMB | bit(F_SWIOTLB) | bit(F_ORDER_PLATFORM);
        for (accepted, verdict) in [
            (offered, Err(Refusal::TwoDialects)),
            (offered & !bit(F_SWIOTLB), Ok(())),
            (DMB, Err(Refusal::DmbNoOrder)),
            (
                (DMB | bit(F_ORDER_PLATFORM)) & !bit(F_ACCESS_PLATFORM),
                Err(Refusal::DmbNoPlatform),
            ),
            (bit(F_VERSION_1) | bit(F_SWIOTLB), Ok(())),
        ] {
            let mut r = registers_of(Dialect::Both, offered, false);
            let effect = accept(&mut r, accepted);
            assert_eq!(effect, Effect::Features(verdict), "{accepted:#x}");
        }
    }

    #[test]
    fn registers_of_dmb_name_the_region() {
        for dialect in [Dialect::Dmb, Dialect::Both] {
            let mut r = registers_of(dialect, DMB, true);
            r.write(64, &[0xff; 4]);
            assert_eq!(read(&r, 64, 2), u64::from(REGION_SHM_ID));
            assert_eq!(read(&r, 66, 2), 1);
            assert_eq!(read(&r, 68, 4), 0);
        }
        assert_eq!(read(&registers(true), 64, 4), 0);
    }

    #[test]
    fn each_dialect_has_its_bits() {
        let mut offer = Offer {
            added: 0,
            hidden: 0,
            swiotlb: true,
            access_platform: false,
            packed: false,
            indirect: true,
            event_idx: true,
        };
        let mut of = |change: fn(&mut Offer), dialect| {
            change(&mut offer);
            let offered = offer.features(dialect, bit(F_VERSION_1) | bit(F_DMB));
            assert_eq!(backend_features(offered, u64::MAX), bit(F_VERSION_1));
            bits(offered)
        };
        assert_eq!(of(|_| {}, Dialect::Swiotlb), [27, 32]);
        assert_eq!(of(|_| {}, Dialect::Dmb), [32, 33, 44]);
        assert_eq!(of(|_| {}, Dialect::Both), [27, 32, 33, 44]);
        assert_eq!(of(|o| o.swiotlb = false, Dialect::Both), [32, 33, 44]);
        assert_eq!(of(|o| o.hidden = bit(33), Dialect::Dmb), [32, 44]);
    }

    #[test]
    fn optional_does_not() {
        let mut r = registers(false);
        assert_eq!(accept(&mut r, bit(F_VERSION_1)), Effect::Features(Ok(())));
        assert_eq!(read(&r, 20, 1), 11);
        assert_eq!(r.write(20, &[15]), Effect::DriverOk);
    }

    #[test]
    fn legacy_any_layout_does_not_satisfy() {
        let mut r = registers(true);
        let effect = accept(&mut r, bit(F_SWIOTLB));
        assert_eq!(effect, Effect::Features(Err(Refusal::NoVersion1)));
    }

    #[test]
    fn only_what_is_offered() {
        let mut r = registers(false);
        let effect = accept(&mut r, OFFERED | bit(5));
        assert_eq!(effect, Effect::Features(Err(Refusal::NotOffered)));
    }

    #[test]
    fn features_stand_after_features_ok() {
        let mut r = registers(true);
        accept(&mut r, OFFERED);
        r.write(8, &0u32.to_le_bytes());
        r.write(12, &0u32.to_le_bytes());
        assert_eq!(r.accepted(), OFFERED);
    }

    #[test]
    fn driver_ok_needs_features_ok() {
        let mut r = registers(true);
        assert_eq!(r.write(20, &[7]), Effect::None);
        assert_eq!(read(&r, 20, 1), 3);
    }

    #[test]
    fn reset_clears_and_takes_the_new_offer() {
        let mut r = registers(true);
        accept(&mut r, OFFERED);
        r.set_needs_reset();
        assert_eq!(read(&r, 20, 1), 11 | 64);
        assert_eq!(r.write(20, &[0]), Effect::Reset);
        assert_eq!(read(&r, 20, 1), 0);
        assert_eq!(r.accepted(), 0);
        r.reset(bit(F_VERSION_1));
        assert_eq!(r.offered(), bit(F_VERSION_1));
    }

    #[test]
    fn needs_reset_is_not_the_drivers() {
        let mut r = registers(true);
        r.write(20, &[0x41]);
        assert_eq!(read(&r, 20, 1), 1);
    }

    #[test]
    fn queue_registers() {
        let mut r = registers(true);
        r.write(22, &1u16.to_le_bytes());
        assert_eq!(read(&r, 24, 2), 256);
        r.write(24, &64u16.to_le_bytes());
        r.write(24, &65u16.to_le_bytes());
        r.write(24, &512u16.to_le_bytes());
        assert_eq!(read(&r, 24, 2), 64);
        r.write(32, &0x1234_5000u32.to_le_bytes());
        r.write(36, &0x38u32.to_le_bytes());
        r.write(40, &0x38_1234_6000u64.to_le_bytes());
        r.write(48, &0x38_1234_7000u64.to_le_bytes());
        assert_eq!(r.write(26, &2u16.to_le_bytes()), Effect::Vector(Some(1)));
        r.write(28, &1u16.to_le_bytes());
        r.write(32, &0u64.to_le_bytes());
        let want = Queue {
            size: 64,
            vector: 2,
            enabled: true,
            desc: 0x38_1234_5000,
            driver: 0x38_1234_6000,
            device: 0x38_1234_7000,
        };
        assert_eq!(r.queues()[1], want);
        assert_eq!(read(&r, 30, 2), 1);
        assert_eq!(read(&r, 36, 4), 0x38);
    }

    #[test]
    fn absent_queue_has_size_0() {
        let mut r = registers(true);
        r.write(22, &2u16.to_le_bytes());
        assert_eq!(read(&r, 24, 2), 0);
        assert_eq!(r.write(26, &0u16.to_le_bytes()), Effect::None);
        r.write(28, &1u16.to_le_bytes());
    }

    #[test]
    fn vectors_that_do_not_exist_read_back_as_none() {
        let mut r = registers(true);
        r.write(16, &3u16.to_le_bytes());
        assert_eq!(read(&r, 16, 2), 0xffff);
        r.write(16, &2u16.to_le_bytes());
        assert_eq!(read(&r, 16, 2), 2);
    }

    #[test]
    fn any_access_is_survived() {
        let mut r = registers(true);
        for at in (0..70).chain([u64::MAX - 3, u64::MAX]) {
            for width in 0..=16 {
                r.read(at, &mut vec![0; width]);
                r.write(at, &vec![0xff; width]);
            }
        }
    }

    #[test]
    fn offer_hides_what_is_not_the_guests() {
        let backend = u64::MAX;
        let offer = Offer {
            added: 0,
            hidden: 0,
            swiotlb: false,
            access_platform: false,
            packed: false,
            indirect: true,
            event_idx: true,
        };
        let offered = offer.features(Dialect::Swiotlb, backend);
        let passed = (0..=23).chain([28, 29, 32, 36]).chain(50..=63);
        assert_eq!(bits(offered), passed.collect::<Vec<_>>());
        let all = Offer {
            added: 0,
            hidden: 0,
            swiotlb: true,
            access_platform: true,
            packed: true,
            indirect: false,
            event_idx: false,
        };
        let offered = all.features(Dialect::Swiotlb, backend);
        assert_eq!(
            offered & ((1 << 27) | (1 << 33) | (1 << 34)),
            (1 << 27) | (1 << 33) | (1 << 34)
        );
        assert_eq!(offered & (bit(28) | bit(29)), 0);
        let told = backend_features(offered, backend);
        assert_eq!(told & ((1 << 27) | (1 << 33)), 0);
    }

    #[test]
    fn what_is_added_is_not_the_backends() {
        let offer = Offer {
            added: bit(5) | bit(F_RING_RESET),
            hidden: bit(15),
            swiotlb: true,
            access_platform: false,
            packed: false,
            indirect: true,
            event_idx: true,
        };
        let backend = bit(F_VERSION_1) | bit(15) | bit(16);
        let offered = offer.features(Dialect::Swiotlb, backend);
        assert_eq!(bits(offered), [5, 16, 27, 32, 40]);
        assert_eq!(bits(backend_features(offered, backend)), [16, 32]);
        assert_eq!(lost_features(offered, offer.added, backend), 0);
        assert_eq!(
            lost_features(offered, offer.added, bit(F_VERSION_1)),
            bit(16)
        );
    }

    #[test]
    fn queue_is_reset_and_enabled_again() {
        let mut r = registers(true);
        r.reset(OFFERED | bit(F_RING_RESET));
        accept(&mut r, OFFERED | bit(F_RING_RESET));
        r.write(22, &1u16.to_le_bytes());
        r.write(24, &64u16.to_le_bytes());
        assert_eq!(r.write(28, &1u16.to_le_bytes()), Effect::None);
        r.write(20, &[15]);
        assert_eq!(r.write(58, &1u16.to_le_bytes()), Effect::QueueReset(1));
        assert_eq!((read(&r, 58, 2), read(&r, 28, 2)), (0, 0));
        assert_eq!(read(&r, 24, 2), 256);
        assert_eq!(r.write(28, &1u16.to_le_bytes()), Effect::QueueEnabled(1));
    }

    #[test]
    fn queue_reset_has_to_be_negotiated() {
        let mut r = registers(true);
        accept(&mut r, OFFERED);
        r.write(20, &[15]);
        r.write(28, &1u16.to_le_bytes());
        assert_eq!(r.write(58, &1u16.to_le_bytes()), Effect::None);
        assert_eq!(read(&r, 28, 2), 1);
    }
}
