// SPDX-License-Identifier: GPL-2.0

//! One device's life: seen, hooked, negotiated, released.
//!
//! - *Seen*: a driver is about to be bound to a device that offers the bit or brings a region
//!   ([`Registry::binding`]). The device gets an [`Attachment`], which it keeps until it leaves
//!   the bus, with its files in debugfs.
//! - *Hooked*: its configuration operations are interposed, so that
//! - *negotiated* is decided in `finalize_features`, where the core would only write down what it
//!   knows ([`Negotiator`]). An accepted device is *bounced*: it has a region, a pool and mapping
//!   operations, and holds the module in use. Any other is unhooked on the spot.
//! - *Released*: the driver is gone; everything is undone.
//!
//! Negotiation is serialised by the core, see [`Locked`]. [`State`] has a lock of its own for the
//! sake of readers in debugfs. All of it sleeps. Lock order: device, [`Registry::attachments`],
//! [`Seen::state`], [`Shared::retired`].

use super::{
    bounce::{
        Bounce,
        Counters,
        FromDevice,
        Usage, //
    },
    debugfs,
    policy::{
        self,
        limits,
        Decision,
        Facts,
        Reason, //
    },
    queues,
    region::{
        self,
        Region, //
    },
    virtio::{
        bus::{
            self,
            Then, //
        },
        config::{
            Hooks,
            Interposer,
            Negotiation,
            Unbound, //
        },
        map::{
            Installed,
            Mapper, //
        },
        Device,
        DeviceId,
        Locked,
        ModuleReference, //
    },
    wire::{
        self,
        Extent,
        Features,
        Finding, //
    }, //
};
use kernel::{
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// The module's parameters.
#[derive(Clone, Copy)]
pub(crate) struct Parameters {
    /// Whether a region that comes without the bit is used.
    pub(crate) hint: bool,
    /// Whether devices that had a driver when the module came are bound anew.
    pub(crate) takeover: bool,
    /// What is in the region where the device is to write.
    pub(crate) from_device: FromDevice,
}

/// Negotiations since the module was loaded, by their end, and devices seen.
#[allow(missing_docs)]
pub(crate) struct Outcomes {
    pub(crate) seen: Atomic<u64>,
    pub(crate) bounced: Atomic<u64>,
    pub(crate) hint: Atomic<u64>,
    pub(crate) declined: Atomic<u64>,
    pub(crate) refused: Atomic<u64>,
}

impl Outcomes {
    fn new() -> Self {
        Self {
            seen: Atomic::new(0),
            bounced: Atomic::new(0),
            hint: Atomic::new(0),
            declined: Atomic::new(0),
            refused: Atomic::new(0),
        }
    }

    fn count(&self, decision: &Decision) {
        let counter = match decision {
            Decision::Accept(_) => &self.bounced,
            Decision::Hint(_) => &self.hint,
            Decision::Decline(_) => &self.declined,
            Decision::Refuse(_) => &self.refused,
            Decision::Ignore(_) => return,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// What all devices have in common.
#[pin_data]
pub(crate) struct Shared {
    module: &'static ThisModule,
    parameters: Parameters,
    unloading: Atomic<bool>,
    /// Negotiations and devices, since load.
    pub(crate) outcomes: Outcomes,
    /// What devices counted whose driver is gone.
    #[pin]
    retired: Mutex<Counters>,
}

/// What is known of one device; outlives its bindings.
#[pin_data]
pub(crate) struct Seen {
    /// The device's name, "virtio3".
    pub(crate) name: CString,
    kind: u32,
    offered: Atomic<u64>,
    /// The status that the core has set since it reset the device.
    status_set: Atomic<u32>,
    generation: Generation,
    shared: Arc<Shared>,
    /// The state of the negotiation.
    #[pin]
    pub(crate) state: Mutex<State>,
}

/// A device's negotiation, as it stands.
pub(crate) struct State {
    /// The driver of the last binding, if there was one, and memory for its name.
    pub(crate) driver: Option<CString>,
    /// What was decided, `None` while it is not.
    pub(crate) decision: Option<Decision>,
    bounced: Option<Installed<Bounce>>,
    /// What was counted in the last binding, if it is over.
    last: Counters,
}

impl State {
    /// The device's bounce buffers, while it is bounced.
    pub(crate) fn bounce(&self) -> Option<&Bounce> {
        self.bounced.as_ref().map(Installed::inner)
    }

    /// What was counted in this binding, or the last.
    pub(crate) fn counters(&self) -> Counters {
        self.bounce().map_or(self.last, Bounce::counters)
    }

    /// How full the pool is; all 0 while there is none.
    pub(crate) fn usage(&self) -> Usage {
        self.bounce().map(Bounce::usage).unwrap_or_default()
    }
}

impl Shared {
    fn new(
        module: &'static ThisModule,
        parameters: Parameters,
    ) -> impl PinInit<Self, core::convert::Infallible> {
        pin_init!(Self {
            module,
            parameters,
            unloading: Atomic::new(false),
            outcomes: Outcomes::new(),
            retired <- new_mutex!(Counters::default()),
        })
    }

    /// Applies the policy to a device as it is now.
    fn decide(&self, dev: &Locked, offered: Features, finding: Finding) -> Decision {
        policy::decide(&Facts {
            device_type: dev.device_type(),
            offered,
            finding,
            names_regions: region::can_be_named(dev),
            own_mapping: dev.has_mapping(),
            hint: self.parameters.hint,
        })
    }
}

impl Seen {
    fn new(dev: &Device, shared: Arc<Shared>) -> Result<impl PinInit<Self, Error>> {
        let name = CString::try_from_fmt(fmt!("virtio{}", dev.index()))?;
        let kind = dev.device_type();
        Ok(try_pin_init!(Self {
            name,
            kind,
            offered: Atomic::new(0),
            status_set: Atomic::new(0),
            generation: Generation::new(),
            shared,
            state <- new_mutex!(State {
                driver: None,
                decision: None,
                bounced: None,
                last: Counters::default(),
            }),
        }))
    }

    fn offered(&self) -> Features {
        Features(self.offered.load(Relaxed))
    }

    /// A driver is about to be bound.
    fn begin(&self, dev: &Locked, offered: u64) {
        self.offered.store(offered, Relaxed);
        // What may be there before a driver is: whoever says more is not believed.
        let before = dev.status() & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        self.status_set.store(before.into(), Relaxed);
        self.generation.begin();
        // Nothing but a name, which may be missing.
        let driver = CString::try_from_fmt(fmt!("{}", dev.driver_name().unwrap_or(c""))).ok();
        let mut state = self.state.lock();
        state.driver = driver;
        state.decision = None;
        state.last = Counters::default();
    }

    /// A driver is bound, or about to be, that is not hooked.
    fn leave_alone(&self, dev: &Locked, offered: u64, decision: Decision) {
        self.begin(dev, offered);
        self.state.lock().decision = Some(decision);
    }
}

impl Unbound for Seen {
    /// Undoes what [`Negotiator::bounce`] did.
    fn unbound(&self, dev: &Locked) {
        let mut state = self.state.lock();
        let Some(bounced) = state.bounced.take() else {
            return;
        };
        let bounce = bounced.inner();
        let live = bounce.live();
        if live != 0 {
            dev_err!(
                dev.as_device(),
                "swiotlb: the driver left {live} mappings in the region, unanswered or forgotten\n"
            );
        }
        let counters = bounce.counters();
        state.last = counters;
        state.decision = Some(Decision::Ignore(Reason::NoDriver));
        *self.shared.retired.lock() += counters;
        // SAFETY: They are those of the device, and the driver is gone with all that was its own.
        unsafe { bounced.remove(dev) };
    }
}

// The pure files have no other traits than those of core.
impl kernel::fmt::Display for Reason {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// Says what was decided, so that an administrator knows what to do.
fn announce(dev: &Device, decision: &Decision) {
    let dev = dev.as_device();
    match decision {
        Decision::Accept(extent) => dev_info!(
            dev,
            "swiotlb: bounced: all rings and buffers stay in the region of {} bytes at {:#x}\n",
            extent.bytes,
            extent.start
        ),
        Decision::Hint(extent) => dev_info!(
            dev,
            "swiotlb: bounced on a hint: rings and buffers stay in the region of {} bytes at {:#x}, though the device does not offer VIRTIO_F_SWIOTLB\n",
            extent.bytes,
            extent.start
        ),
        Decision::Decline(reason @ Reason::NoRegion) => dev_err!(
            dev,
            "swiotlb: not bounced: {reason}. The device is at fault: it needs the SWIOTLB capability, or must not offer the feature\n"
        ),
        Decision::Decline(reason) => dev_warn!(
            dev,
            "swiotlb: not bounced: {reason}; VIRTIO_F_SWIOTLB is not accepted, and the device may refuse to work without\n"
        ),
        Decision::Refuse(reason @ Reason::Moved) => dev_err!(
            dev,
            "swiotlb: not resumed: {reason}; unbind and bind the driver\n"
        ),
        Decision::Refuse(reason) => dev_err!(
            dev,
            "swiotlb: no driver is bound: {reason}. The device offers VIRTIO_F_SWIOTLB, so it is not used without\n"
        ),
        Decision::Ignore(reason @ Reason::NotTakenOver) => dev_warn!(
            dev,
            "swiotlb: {reason}: a driver uses it already; unbind and bind the driver, or load the module with takeover=1\n"
        ),
        Decision::Ignore(reason) => dev_info!(dev, "swiotlb: not bounced: {reason}\n"),
    }
}

/// Status bits (virtio 1.4, 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
}

/// What a device says of the generation of its configuration. The core reads until it hears the
/// same twice, which a device can withhold for ever.
struct Generation {
    last: Atomic<u32>,
    /// How many in a row were others than the one before.
    changes: Atomic<u32>,
}

impl Generation {
    /// More than there are changes of a configuration in the time of so many reads of it.
    const MANY: u32 = 100;

    fn new() -> Self {
        Self {
            last: Atomic::new(0),
            changes: Atomic::new(0),
        }
    }

    /// A driver is about to be bound.
    fn begin(&self) {
        self.changes.store(0, Relaxed);
    }

    /// What the core is told, and whether the device is no longer listened to from now on. Then
    /// it is not before a driver is bound anew: one that repeats itself where nobody needs it
    /// would go on for ever.
    fn heard(&self, generation: u32) -> (u32, bool) {
        let before = self.changes.load(Relaxed);
        if before == Self::MANY {
            return (0, false);
        }
        let same = self.last.xchg(generation, Relaxed) == generation;
        let changes = if same { 0 } else { before + 1 };
        self.changes.store(changes, Relaxed);
        (generation, changes == Self::MANY)
    }
}

/// The features that make a device use nothing but its region.
const CONFINING: Features = Features::VERSION_1
    .with(Features::SWIOTLB)
    .with(Features::ACCESS_PLATFORM);

/// Decides a device's negotiation from within its configuration operations.
pub(crate) struct Negotiator(Arc<Seen>);

impl Negotiator {
    /// Decides, and does what is needed to bounce the device if it is to be.
    fn decide(&self, negotiation: &Negotiation<'_>) -> (Decision, Option<Installed<Bounce>>) {
        let (seen, dev) = (&self.0, negotiation.dev());
        let decision = seen.shared.decide(dev, seen.offered(), region::find(dev));
        let Some(extent) = decision.extent() else {
            return (decision, None);
        };
        match self.bounce(negotiation, &extent) {
            Ok(bounced) => (decision, Some(bounced)),
            Err(reason) => (decision.failed(reason), None),
        }
    }

    /// Maps the region, makes the pool, and gives the device its mapping operations.
    fn bounce(
        &self,
        negotiation: &Negotiation<'_>,
        extent: &Extent,
    ) -> Result<Installed<Bounce>, Reason> {
        let (seen, dev) = (&self.0, negotiation.dev());
        let module = ModuleReference::get(seen.shared.module).ok_or(Reason::Unloading)?;
        let region = Region::new(dev, extent)?;
        let mapper = Bounce::new(
            region,
            seen.kind,
            seen.shared.parameters.from_device,
            dev.as_device(),
        )
        .and_then(|bounce| Ok(KBox::new(Mapper::new(bounce), GFP_KERNEL)?))
        .map_err(|_| Reason::NoMemory)?;
        negotiation
            .when_unbound(seen.clone())
            .map_err(|_| Reason::NoMemory)?;
        // SAFETY: Nothing was bounced in this binding: it is the first negotiation, before which a
        // driver has no rings.
        unsafe { mapper.install(dev, module) }.map_err(|_| Reason::Transport)
    }
}

impl Hooks for Negotiator {
    fn offered(&self, _dev: &Device, offered: u64) {
        // What counts is what the core was told, and it asks once in a binding.
        self.0.offered.store(offered, Relaxed);
    }

    /// Runs again after the driver's `validate`, and on resume: then everything is in place.
    fn finalize(&self, negotiation: Negotiation<'_>) -> Result {
        let (seen, dev) = (&*self.0, negotiation.dev());
        let mut state = seen.state.lock();
        let decision = match (&state.bounced, state.decision) {
            (Some(bounced), Some(decision)) => {
                let region = bounced.inner().region();
                // R19: never under a driver's feet.
                if decision.extent().is_some() && !region.is_in_place(dev) {
                    // Sticks until the driver is bound anew, wherever the region goes next.
                    let moved = Decision::Refuse(Reason::Moved);
                    announce(dev, &moved);
                    seen.shared.outcomes.count(&moved);
                    state.decision = Some(moved);
                    return Err(ENODEV);
                }
                decision
            }
            _ => {
                let (decision, bounced) = self.decide(&negotiation);
                announce(dev, &decision);
                seen.shared.outcomes.count(&decision);
                state.decision = Some(decision);
                state.bounced = bounced;
                decision
            }
        };
        drop(state);

        let features = Features(dev.features()).without(Features::SWIOTLB);
        match decision {
            Decision::Refuse(_) => Err(ENODEV),
            Decision::Decline(_) | Decision::Ignore(_) => {
                negotiation.set_features(features.0);
                negotiation.step_aside();
                negotiation.finalize_features()
            }
            Decision::Accept(extent) | Decision::Hint(extent) => {
                // The device is told what it offered, and no more ...
                let mut told = features;
                if told.has(Features::RING_PACKED) && !limits::may_pack(seen.kind, extent.bytes) {
                    dev_info!(
                        dev.as_device(),
                        "swiotlb: split rings are used: the region of {} bytes is too small for packed ones\n",
                        extent.bytes
                    );
                    told = told.without(Features::RING_PACKED);
                }
                let masked = limits::features_to_mask(seen.kind, told, extent.bytes);
                if masked != Features(0) {
                    dev_info!(
                        dev.as_device(),
                        "swiotlb: features {:#x} are not used: the region of {} bytes has no room for what they put into it\n",
                        masked.0,
                        extent.bytes
                    );
                    told = told.without(masked);
                }
                let beyond = dev.features_beyond();
                let masked = limits::features_to_mask_beyond(seen.kind, beyond, extent.bytes);
                if masked != 0 {
                    dev_info!(
                        dev.as_device(),
                        "swiotlb: features {:#x} from 64 on are not used: nor do they fit the region\n",
                        masked
                    );
                    negotiation.set_features_beyond(beyond & !masked);
                }
                if matches!(decision, Decision::Accept(_)) {
                    told = told.with(Features::SWIOTLB);
                }
                if !seen.offered().has(Features::ACCESS_PLATFORM) {
                    told = told.without(Features::ACCESS_PLATFORM);
                }
                negotiation.set_features(told.0);
                let finalized = negotiation.finalize_features();
                let kept = Features(dev.features());
                // ... and the core is told what makes it map rings and buffers at all. Also if
                // this failed: after a suspend there may be rings, which are freed by it.
                negotiation.set_features(kept.with(Features::ACCESS_PLATFORM).0);
                finalized?;
                // The transport drops what it does not know. Not what this is about, though.
                if !kept.has(told.only(CONFINING)) {
                    dev_err!(
                        dev.as_device(),
                        "swiotlb: no driver is bound: the transport dropped features that were agreed on\n"
                    );
                    return Err(ENODEV);
                }
                Ok(())
            }
        }
    }

    fn queues(&self, dev: &Locked, count: u32) {
        let state = self.0.state.lock();
        let Some(bytes) = state.bounce().map(|bounce| bounce.region().bytes()) else {
            return;
        };
        drop(state);
        let features = Features(dev.features());
        let longest = |index| limits::longest_queue(self.0.kind, features, count, index, bytes);
        if let Some((queues, entries)) = queues::shorten(dev, count, longest) {
            dev_info!(
                dev.as_device(),
                "swiotlb: shortened {queues} queues, to {entries} entries: what the driver puts there has to leave room in the region of {bytes} bytes\n"
            );
        }
    }

    fn reset(&self, _dev: &Device) {
        self.0.status_set.store(0, Relaxed);
    }

    fn set_status(&self, _dev: &Device, status: u8) {
        self.0.status_set.store(status.into(), Relaxed);
    }

    /// All bits but one are the driver's to set, and only one is the device's to refuse (virtio
    /// 1.4, 2.1 and 3.1.1). The core would warn of a device that says anything else.
    fn status(&self, _dev: &Device, said: u8) -> u8 {
        match self.0.status_set.load(Relaxed) as u8 {
            // Reset, and nobody there yet whom it could tell that it needs one.
            0 => 0,
            set => (set & !status::FEATURES_OK) | said & (set | status::NEEDS_RESET),
        }
    }

    fn generation(&self, dev: &Device, generation: u32) -> u32 {
        let (generation, ignored) = self.0.generation.heard(generation);
        if ignored {
            dev_err!(
                dev.as_device(),
                "swiotlb: the configuration never stands still: fields may not belong together\n"
            );
        }
        generation
    }

    fn read(&self, dev: &Device, offset: u32, bytes: &mut [u8]) {
        let bounds = wire::bounds(dev.device_type());
        if bounds.is_empty() {
            return;
        }
        // The drivers of these types read where they may sleep.
        let state = self.0.state.lock();
        let Some(bounce) = state.bounce() else {
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
            let value = bounce.clamp(bound, u32::from_le_bytes(value));
            for (to, from) in field.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
    }
}

/// A device that was seen, until it leaves the bus.
pub(crate) struct Attachment {
    id: DeviceId,
    hook: Interposer<Negotiator>,
    /// Dropped without [`Registry::attachments`] held: waits for readers.
    _files: debugfs::DeviceFiles,
}

impl Attachment {
    /// What is known of the device.
    pub(crate) fn seen(&self) -> &Seen {
        &self.hook.hooks().0
    }
}

/// All devices that were seen.
#[pin_data]
pub(crate) struct Registry {
    shared: Arc<Shared>,
    root: debugfs::Root,
    #[pin]
    attachments: Mutex<KVec<Arc<Attachment>>>,
}

impl Registry {
    /// An empty registry.
    pub(crate) fn new(
        module: &'static ThisModule,
        parameters: Parameters,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            shared: Arc::pin_init(Shared::new(module, parameters), GFP_KERNEL)?,
            root: debugfs::Root::new()?,
            attachments <- new_mutex!(KVec::new()),
        })
    }

    /// The directory of the module's files.
    pub(crate) fn root(&self) -> &debugfs::Root {
        &self.root
    }

    /// What all devices have in common.
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Calls `f` for every device that was seen, in that order.
    ///
    /// # Errors
    ///
    /// Those of `f`, which end the walk.
    pub(crate) fn for_each<E>(&self, mut f: impl FnMut(&Seen) -> Result<(), E>) -> Result<(), E> {
        self.attachments.lock().iter().try_for_each(|a| f(a.seen()))
    }

    /// Counters of all devices since load, and how full their pools are.
    pub(crate) fn totals(&self) -> (Counters, Usage) {
        let mut usage = Usage::default();
        // The lock order allows it, and keeps a binding from being counted twice or not at all.
        let attachments = self.attachments.lock();
        let mut counters = Counters::default();
        for attachment in &*attachments {
            let state = attachment.seen().state.lock();
            if let Some(bounce) = state.bounce() {
                counters += bounce.counters();
                usage += bounce.usage();
            }
        }
        counters += *self.shared.retired.lock();
        (counters, usage)
    }

    fn find(&self, id: DeviceId) -> Option<Arc<Attachment>> {
        let attachments = self.attachments.lock();
        attachments.iter().find(|a| a.id == id).cloned()
    }

    /// The attachment of `dev`, new if it has none; `None` if the module is being unloaded.
    fn attach(&self, dev: &Locked) -> Result<Option<Arc<Attachment>>> {
        if let Some(attachment) = self.find(dev.id()) {
            return Ok(Some(attachment));
        }
        let seen = Arc::pin_init(Seen::new(dev, self.shared.clone())?, GFP_KERNEL)?;
        let attachment = Arc::new(
            Attachment {
                id: dev.id(),
                hook: Interposer::new(dev, Negotiator(seen.clone())),
                _files: debugfs::DeviceFiles::new(&self.root, seen)?,
            },
            GFP_KERNEL,
        )?;
        let mut attachments = self.attachments.lock();
        // Whoever unloads it knows all that are there now, and waits for the lock of each.
        if self.shared.unloading.load(Relaxed) {
            return Ok(None);
        }
        attachments.push(attachment.clone(), GFP_KERNEL)?;
        self.shared.outcomes.seen.fetch_add(1, Relaxed);
        Ok(Some(attachment))
    }

    /// Sees to a device that was there before the module. May sleep.
    pub(crate) fn late(&self, dev: &Locked) -> Then {
        // One that came, or whose driver did, after the module began to listen.
        if self.knows(dev) {
            return Then::Nothing;
        }
        let offered = Features(dev.offered_features());
        let finding = region::find(dev);
        if !policy::is_relevant(offered, finding) {
            return Then::Nothing;
        }
        // The refusal of an earlier driver sticks to the device's status.
        if dev.start_over() {
            return Then::Bind;
        }
        // What is bound keeps working, unless it is to be taken over and can be.
        let reason = match self.shared.decide(dev, offered, finding) {
            Decision::Accept(_) | Decision::Hint(_) => {
                (!self.shared.parameters.takeover).then_some(Reason::NotTakenOver)
            }
            decision => decision.reason(),
        };
        match reason {
            None => Then::Rebind,
            Some(reason) => {
                self.leave_alone(dev, offered, Decision::Ignore(reason));
                Then::Nothing
            }
        }
    }

    /// Lists a device whose driver was bound before the module came.
    fn leave_alone(&self, dev: &Locked, offered: Features, decision: Decision) {
        announce(dev, &decision);
        match self.attach(dev) {
            Ok(Some(attachment)) => attachment.seen().leave_alone(dev, offered.0, decision),
            Ok(None) => {}
            Err(_) => dev_err!(
                dev.as_device(),
                "swiotlb: not enough memory to list the device\n"
            ),
        }
    }

    /// Whether `dev` was seen, and may be hooked.
    pub(crate) fn knows(&self, dev: &Device) -> bool {
        self.find(dev.id()).is_some()
    }

    /// Unhooks a device for good: the module is being unloaded.
    pub(crate) fn unhook(&self, dev: &Locked) -> Then {
        if let Some(attachment) = self.find(dev.id()) {
            attachment.hook.remove(dev);
        }
        Then::Nothing
    }

    /// From now on no device is hooked that is not yet known, nor a known one once its lock was
    /// taken after this.
    pub(crate) fn stop(&self) {
        let _attachments = self.attachments.lock();
        self.shared.unloading.store(true, Relaxed);
    }
}

impl bus::Events for Registry {
    fn binding(&self, dev: &Locked) {
        if self.shared.unloading.load(Relaxed) {
            return;
        }
        let offered = dev.offered_features();
        if !policy::is_relevant(Features(offered), region::find(dev)) {
            // Of one that was of concern once, nothing that was said holds for this driver.
            if let Some(attachment) = self.find(dev.id()) {
                let decision = Decision::Ignore(Reason::NotConcerned);
                attachment.seen().leave_alone(dev, offered, decision);
                // With CONFIG_DEBUG_TEST_DRIVER_REMOVE the core does not tell of the end of its
                // last driver.
                attachment.hook.remove(dev);
            }
            return;
        }
        let attachment = match self.attach(dev) {
            Ok(Some(attachment)) => attachment,
            Ok(None) => return,
            Err(_) => {
                dev_err!(
                    dev.as_device(),
                    "swiotlb: not bounced: not enough memory; unbind and bind the driver when there is\n"
                );
                return;
            }
        };
        attachment.seen().begin(dev, offered);
        // SAFETY: The attachment is the device's own, on the heap, and kept until the device
        // has left the bus, or the module has unhooked it and waited.
        unsafe { attachment.hook.install(dev) };
    }

    fn unbound(&self, dev: &Locked) {
        if let Some(attachment) = self.find(dev.id()) {
            attachment.hook.remove(dev);
        }
    }

    fn removed(&self, dev: &Device) {
        let gone = {
            let mut attachments = self.attachments.lock();
            let at = attachments.iter().position(|a| a.id == dev.id());
            at.and_then(|at| attachments.remove(at).ok())
        };
        // Its files wait for readers, who may want the lock.
        drop(gone);
    }
}
