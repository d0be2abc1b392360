// SPDX-License-Identifier: GPL-2.0

//! One virtio device, from the first driver that is about to be bound until it leaves the bus.
//!
//! [`State`] is the state of its negotiation. `negotiate` moves it from one state to the next:
//!
//! ```text
//!             bind                  decide
//!     Idle ----------> Negotiating --------> Bounced, LeftAlone or Refused
//!       ^                                       |
//!       +---------------------------------------+ unbind of a bounced device
//! ```
//!
//! The core serialises negotiations. The state has a lock of its own, because debugfs and sysfs
//! read it. All functions may sleep. Lock order: device, list of the registry, [`Device::binding`],
//! [`Common::retired`], [`Common::shared_pools`].

mod guard;
pub(crate) mod negotiate;
pub(crate) mod report;

use super::{
    bounce::{
        Bounce,
        Counters,
        Usage, //
    },
    parameters::Parameters,
    policy::{
        Decision,
        Reason, //
    },
    region::SharedPools,
    virtio::{
        self,
        map::Installed,
        Locked, //
    },
    wire::Features, //
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

/// Decisions since the module was loaded, by their kind.
#[allow(missing_docs)]
pub(crate) struct Outcomes {
    pub(crate) bounced: Atomic<u64>,
    pub(crate) hint: Atomic<u64>,
    pub(crate) declined: Atomic<u64>,
    pub(crate) refused: Atomic<u64>,
    /// Devices that had a driver before the module was loaded, though confinement is required.
    pub(crate) unconfined: Atomic<u64>,
}

impl Outcomes {
    fn count(&self, decision: &Decision) {
        let counter = match decision {
            Decision::Accept(_) => &self.bounced,
            Decision::Hint(_) => &self.hint,
            Decision::Decline(_) => &self.declined,
            Decision::Refuse(_) | Decision::Bar(_) => &self.refused,
            Decision::Ignore(_) => return,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// State that all devices share.
#[pin_data]
pub(crate) struct Common {
    module: &'static ThisModule,
    parameters: Parameters,
    pub(crate) shared_pools: Arc<SharedPools>,
    pub(crate) outcomes: Outcomes,
    /// Counters of past bindings.
    #[pin]
    retired: Mutex<Counters>,
}

impl Common {
    /// Nothing decided, nothing counted.
    pub(crate) fn new(
        module: &'static ThisModule,
        parameters: Parameters,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            module,
            parameters,
            shared_pools: Arc::pin_init(SharedPools::new(), GFP_KERNEL)?,
            outcomes: Outcomes {
                bounced: Atomic::new(0),
                hint: Atomic::new(0),
                declined: Atomic::new(0),
                refused: Atomic::new(0),
                unconfined: Atomic::new(0),
            },
            retired <- new_mutex!(Counters::default()),
        }? Error)
    }

    /// The parameters that hold for `dev`: those that the module was loaded with.
    #[cfg_attr(not(CONFIG_KUNIT = "y"), allow(unused_variables))]
    pub(crate) fn parameters(&self, dev: &virtio::Device) -> Parameters {
        #[cfg(CONFIG_KUNIT = "y")]
        if let Some(fake) = crate::tests::fake::Region::of(dev) {
            return fake.parameters(self.parameters);
        }
        self.parameters
    }

    /// Counters of the past bindings of all devices.
    pub(crate) fn retired(&self) -> Counters {
        *self.retired.lock()
    }
}

/// A virtio device that concerns the module. It outlives the device's bindings.
#[pin_data]
pub(crate) struct Device {
    /// The device's name, "virtio3".
    pub(crate) name: CString,
    device_type: u32,
    offered: Atomic<u64>,
    status: guard::Status,
    generation: guard::Generation,
    common: Arc<Common>,
    /// The present binding, or the last one.
    #[pin]
    pub(crate) binding: Mutex<Binding>,
}

/// A driver's binding to a device.
pub(crate) struct Binding {
    /// The driver's name. `None` if there was no driver, or no memory for its name.
    pub(crate) driver: Option<CString>,
    state: State,
    /// The counters, if the binding is over.
    last: Counters,
}

/// The state of a device's negotiation.
enum State {
    /// The driver of a bounced device was unbound, or there was no driver yet.
    Idle,
    /// A driver is about to be bound, and nothing is decided.
    Negotiating,
    /// Rings and buffers of the driver are in the region. The module cannot be unloaded.
    Bounced(Bounced),
    /// The driver works as without the module.
    LeftAlone(Decision),
    /// No driver may be bound.
    Refused(Reason),
}

/// A bounced device.
struct Bounced {
    /// [`Decision::Accept`] or [`Decision::Hint`].
    decision: Decision,
    bounce: Installed<Bounce>,
    /// Whether the region has moved (R19). The driver still has its rings there. It is not resumed
    /// until it is bound again.
    moved: bool,
}

impl Binding {
    /// The decision, `None` before there is one.
    fn decision(&self) -> Option<Decision> {
        match &self.state {
            State::Idle => Some(Decision::Ignore(Reason::NoDriver)),
            State::Negotiating => None,
            State::Bounced(bounced) if bounced.moved => Some(Decision::Refuse(Reason::Moved)),
            State::Bounced(bounced) => Some(bounced.decision),
            State::LeftAlone(decision) => Some(*decision),
            State::Refused(reason) => Some(Decision::Refuse(*reason)),
        }
    }

    /// The value of `mode` in debugfs.
    pub(crate) fn mode(&self) -> &'static str {
        self.decision().map_or("negotiating", |d| d.mode())
    }

    /// Why the device is not bounced, if that is the decision.
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.decision()?.reason()
    }

    /// The device's bounce buffers, while it has them.
    pub(crate) fn bounce(&self) -> Option<&Bounce> {
        match &self.state {
            State::Bounced(bounced) => Some(bounced.bounce.inner()),
            _ => None,
        }
    }

    /// The counters of this binding, or the last.
    pub(crate) fn counters(&self) -> Counters {
        self.bounce().map_or(self.last, Bounce::counters)
    }

    /// How full the pool is; all 0 while there is none.
    pub(crate) fn usage(&self) -> Usage {
        self.bounce().map(Bounce::usage).unwrap_or_default()
    }
}

impl Device {
    /// A device that has no driver yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        dev: &virtio::Device,
        common: Arc<Common>,
    ) -> Result<impl PinInit<Self, Error>> {
        let name = CString::try_from_fmt(fmt!("virtio{}", dev.index()))?;
        let device_type = dev.device_type();
        Ok(try_pin_init!(Self {
            name,
            device_type,
            offered: Atomic::new(0),
            status: guard::Status::new(),
            generation: guard::Generation::new(),
            common,
            binding <- new_mutex!(Binding {
                driver: None,
                state: State::Idle,
                last: Counters::default(),
            }),
        }))
    }

    /// The features that the device offered when the core last read them.
    fn offered_features(&self) -> Features {
        Features(self.offered.load(Relaxed))
    }

    /// Begins a binding: a driver is about to be bound to a device that offers `offered`.
    pub(crate) fn begin(&self, dev: &Locked, offered: Features) {
        self.offered.store(offered.0, Relaxed);
        self.status.begin(dev.status());
        self.generation.begin();
        // A missing name is no error: it is only shown.
        let driver = CString::try_from_fmt(fmt!("{}", dev.driver_name().unwrap_or(c""))).ok();
        let mut binding = self.binding.lock();
        binding.driver = driver;
        binding.state = State::Negotiating;
        binding.last = Counters::default();
    }

    /// Begins a binding in which the driver is left alone.
    pub(crate) fn leave_alone(&self, dev: &Locked, offered: Features, decision: Decision) {
        self.begin(dev, offered);
        self.binding.lock().state = State::LeftAlone(decision);
    }
}
