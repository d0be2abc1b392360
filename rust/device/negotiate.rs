// SPDX-License-Identifier: GPL-2.0

//! Negotiates for a device, from within its configuration operations.
//!
//! The first negotiation of a probe decides, and makes what is needed to bounce the device. A later
//! one decides nothing: it compares the region, and tells the device the planned features again.

use super::{
    super::{
        bounce::Bounce,
        parameters::Parameters,
        policy::{
            self,
            limits::{
                self,
                Room, //
            },
            plan::{
                Agreement,
                Plan, //
            },
            Decision,
            Facts,
            Reason, //
        },
        queues,
        region::{
            self,
            Region, //
        },
        trace,
        virtio::{
            self,
            config::{
                Again,
                ConfigOverride,
                First,
                Hooks,
                Identity,
                Negotiation,
                Unbound, //
            },
            map::{
                Installed,
                Mapper, //
            },
            Locked,
            ModuleReference, //
        },
        wire::{
            self,
            Bound,
            Extent,
            Features,
            Findings, //
        }, //
    },
    report,
    Bounced,
    Device,
    State, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    }, //
};

/// Collects the facts of a device and decides. May sleep.
pub(crate) fn decide(
    dev: &Locked,
    offered: Features,
    found: Findings,
    parameters: &Parameters,
) -> Decision {
    policy::decide(&Facts {
        device_type: dev.device_type(),
        offered,
        found,
        dmb: parameters.dmb,
        names_regions: region::can_be_named(dev),
        own_mapping: dev.has_mapping(),
        tried: parameters.trusts(dev.device_type()),
        hint: parameters.hint,
        required: parameters.requires(dev.device_type()),
    })
}

/// The most segments of a request that the queues of `dev` can hold in `room`. May sleep. None of
/// the queues may exist yet.
fn most_segments(dev: &virtio::Device, features: Features, room: Room) -> u32 {
    let cpus = kernel::cpu::nr_cpu_ids();
    limits::most_segments(dev.device_type(), features, cpus, room, |queues| {
        queues::shortest(dev, queues)
    })
}

/// The override of a device's configuration operations.
pub(crate) type Override = ConfigOverride<Arc<Device>>;

static IDENTITY: Identity<Arc<Device>> = Identity::new();

impl Device {
    /// Decides in the first negotiation of a probe, and carries out the decision.
    fn negotiate(self: &Arc<Self>, first: &First<'_>) -> Result {
        let dev = first.locked();
        let parameters = self.common.parameters(dev);
        let offered = self.offered_features();
        let offers_dmb = policy::offers_dmb(offered, parameters.dmb);
        let found = region::find(dev, offers_dmb, &parameters);
        let wanted = decide(dev, offered, found, &parameters);
        let made = wanted.extent().map(|extent| self.bounce(first, &extent));
        let decision = match &made {
            Some(Ok(bounce)) => wanted.opened(*bounce.inner().region().extent()),
            Some(Err(reason)) => wanted.failed(*reason, parameters.requires(self.device_type)),
            None => wanted,
        };
        report::decision(dev, &decision);
        self.common.outcomes.count(&decision);
        let region = made
            .as_ref()
            .and_then(|made| Some(made.as_ref().ok()?.inner().region()));
        trace::negotiated(
            dev.as_device(),
            decision.mode(),
            region.map(|region| (region.extent(), region.device_address())),
        );
        self.binding.lock().state = match (decision, made) {
            (_, Some(Ok(bounce))) => State::Bounced(Bounced {
                decision,
                bounce,
                moved: false,
            }),
            (Decision::Refuse(reason) | Decision::Bar(reason), _) => State::Refused(reason),
            _ => State::LeftAlone(decision),
        };
        match decision {
            Decision::Accept(_) | Decision::Hint(_) => self.tell(first, &decision),
            Decision::Decline(_) | Decision::Ignore(_) => {
                first.remove_override();
                self.tell_without(first)
            }
            Decision::Refuse(_) | Decision::Bar(_) => {
                // Otherwise the transport acts on features that were never agreed on: it looks for
                // an admin queue, at hibernation or at a reset of the function.
                first.set_features(0);
                first.set_features_beyond(0);
                Err(ENODEV)
            }
        }
    }

    /// Checks that a request in `room` can carry a block of the device, or another unit that is not
    /// divided.
    fn carries_units(&self, first: &First<'_>, room: Room) -> Result<(), Reason> {
        let agreed = Features(first.features());
        for &(at, feature) in wire::units(self.device_type) {
            if !agreed.has(feature) {
                continue;
            }
            let segments = match agreed.has(Features::BLK_SEG_MAX) {
                true => first.read_le32(wire::BLK_SEG_MAX),
                false => 1,
            };
            let unit = first.read_le32(at);
            if let Some(needed) = limits::needed(self.device_type, room, unit, segments) {
                return Err(Reason::Unit {
                    bytes: unit,
                    needed,
                });
            }
        }
        Ok(())
    }

    /// Maps the region, makes the pool, and installs the mapping operations.
    fn bounce(
        self: &Arc<Self>,
        first: &First<'_>,
        found: &Extent,
    ) -> Result<Installed<Bounce>, Reason> {
        let dev = first.locked();
        let module = ModuleReference::get(self.common.module).ok_or(Reason::Unloading)?;
        let region = Region::new(dev, found, &self.common.shared_pools)?;
        self.carries_units(first, region.room())?;
        let mapper = Bounce::new(
            region,
            self.device_type,
            self.common.parameters(dev).from_device,
            dev.as_device(),
        )
        .and_then(|bounce| Ok(KBox::new(Mapper::new(bounce), GFP_KERNEL)?))
        .map_err(|_| Reason::NoMemory)?;
        // SAFETY: This is the first negotiation, before which a driver has no rings. The module
        // stays until the device has no driver any more, or the operations are removed below.
        let bounce = unsafe { mapper.install(dev) }.map_err(|_| Reason::Transport)?;
        match first.when_unbound(self.clone(), module) {
            Ok(()) => Ok(bounce),
            Err(_) => {
                // SAFETY: The operations were installed just now, and there are no rings yet.
                unsafe { bounce.remove(dev) };
                Err(Reason::NoMemory)
            }
        }
    }

    /// Handles a later negotiation, which decides nothing.
    fn negotiate_again(&self, again: &Again<'_>) -> Result {
        let mut binding = self.binding.lock();
        let decision = match &mut binding.state {
            State::Bounced(bounced) => {
                let region = bounced.bounce.inner().region();
                // R19: never under the queues of a driver.
                if !bounced.moved && !region.is_in_place(again.dev()) {
                    bounced.moved = true;
                    let moved = Decision::Refuse(Reason::Moved);
                    report::decision(again.dev(), &moved);
                    trace::negotiated(again.dev().as_device(), moved.mode(), None);
                    self.common.outcomes.count(&moved);
                }
                if bounced.moved {
                    return Err(ENODEV);
                }
                // The core has reset the device. Drivers of sound, input, scsi and vsock devices
                // delete their queues at suspend with buffers posted. Only the module knows of
                // these buffers.
                bounced.bounce.inner().end_orphans();
                bounced.decision
            }
            // The override was removed while the core called it.
            State::LeftAlone(_) => {
                drop(binding);
                return self.tell_without(again);
            }
            // A reset of the function beside a bind or an unbind. There is no driver to negotiate
            // for, or its own negotiation is yet to come.
            State::Idle | State::Negotiating | State::Refused(_) => return Err(ENODEV),
        };
        drop(binding);
        self.tell(again, &decision)
    }

    /// Tells the device the features of a device that is not bounced.
    fn tell_without(&self, negotiation: &Again<'_>) -> Result {
        let bits = Features::SWIOTLB.with(self.common.parameters(negotiation.dev()).dmb);
        negotiation.set_features(Features(negotiation.features()).without(bits).0);
        negotiation.finalize_features()
    }

    /// Tells a bounced device its features, and sets those that the core needs.
    fn tell(&self, negotiation: &Again<'_>, decision: &Decision) -> Result {
        let dev = negotiation.dev();
        let Some(extent) = decision.extent() else {
            return Err(EINVAL);
        };
        let parameters = self.common.parameters(dev);
        let plan = Plan::new(&Agreement {
            device_type: self.device_type,
            room: region::room(dev, &extent),
            accepts: decision.accepted(parameters.dmb),
            offered: self.offered_features(),
            agreed: Features(negotiation.features()),
            agreed_beyond: negotiation.features_beyond(),
            packed_disks: parameters.packed_disks,
        });
        report::masked(dev, &plan, extent.bytes);
        negotiation.set_features_beyond(plan.told_beyond);
        negotiation.set_features(plan.told.0);
        let finalized = negotiation.finalize_features();
        let kept = Features(negotiation.features());
        // Also after an error of the transport: after a suspend there may be rings, and the core
        // needs the bit to free them.
        negotiation.set_features(Plan::for_core(kept).0);
        finalized?;
        if !plan.is_kept(kept) {
            report::dropped(dev);
            return Err(ENODEV);
        }
        Ok(())
    }
}

impl Unbound for Device {
    /// Undoes what `Device::bounce` did.
    fn unbound(&self, dev: &Locked) {
        let mut binding = self.binding.lock();
        let State::Bounced(bounced) = core::mem::replace(&mut binding.state, State::Idle) else {
            return;
        };
        let bounce = bounced.bounce.inner();
        let live = bounce.live();
        if live != 0 {
            report::leaked(dev, live);
        }
        let counters = bounce.counters();
        binding.last = counters;
        *self.common.retired.lock() += counters;
        // SAFETY: They are those of the device, and the driver is gone with all that was its own.
        unsafe { bounced.bounce.remove(dev) };
    }
}

impl Hooks for Arc<Device> {
    fn identity() -> &'static Identity<Self> {
        &IDENTITY
    }

    fn offered(&self, _dev: &virtio::Device, offered: u64) {
        // The features that the core was told count. The core reads them once in a binding.
        self.offered.store(offered, Relaxed);
    }

    fn finalize(&self, negotiation: Negotiation<'_>) -> Result {
        match &negotiation {
            Negotiation::First(first) => self.negotiate(first),
            Negotiation::Again(again) => self.negotiate_again(again),
        }
    }

    fn queues(&self, dev: &virtio::Device, features: u64, count: u32) {
        let binding = self.binding.lock();
        let Some(bounce) = binding.bounce() else {
            return;
        };
        let room = bounce.region().room();
        let features = Features(features);
        if room.fixed_queues {
            bounce.limit_rings(features, count);
            return;
        }
        drop(binding);
        let longest = |index| limits::longest_queue(self.device_type, features, count, index, room);
        if let Some((queues, entries)) = queues::shorten(dev, count, longest) {
            report::shortened(dev, queues, entries, room.bytes);
        }
    }

    fn reset(&self, _dev: &virtio::Device) {
        self.status.reset();
    }

    fn set_status(&self, _dev: &virtio::Device, status: u8) {
        self.status.set(status);
    }

    fn status(&self, _dev: &virtio::Device, status: u8) -> u8 {
        self.status.filter(status)
    }

    fn generation(&self, dev: &virtio::Device, generation: u32) -> u32 {
        let (generation, ignored) = self.generation.filter(generation);
        if ignored {
            report::unsteady(dev);
        }
        generation
    }

    fn read(&self, dev: &virtio::Device, features: u64, offset: u32, bytes: &mut [u8]) {
        let bounds = wire::bounds(dev.device_type());
        if bounds.is_empty() {
            return;
        }
        // The drivers of these types read where they may sleep.
        let binding = self.binding.lock();
        let Some(bounce) = binding.bounce() else {
            return;
        };
        for &(at, len, bound) in bounds {
            let Some(field) = at
                .checked_sub(offset)
                .and_then(|skip| bytes.get_mut(skip as usize..)?.get_mut(..len))
            else {
                continue;
            };
            let mut value = [0; 4];
            for (to, from) in value.iter_mut().zip(&*field) {
                *to = *from;
            }
            let mut value = u32::from_le_bytes(value);
            if bound == Bound::Segments {
                let most = bounce.most_segments(|| {
                    most_segments(dev, Features(features), bounce.region().room())
                });
                value = value.min(most);
            }
            let value = bounce.clamp(bound, value);
            for (to, from) in field.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
    }
}
