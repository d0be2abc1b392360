// SPDX-License-Identifier: GPL-2.0

//! The list of relevant devices, kept by events of the virtio bus, and the files about all devices.
//!
//! All functions may sleep.

use super::{
    bounce::{
        Counters,
        Usage, //
    },
    debugfs::{
        self,
        file::{
            File,
            Text, //
        }, //
    },
    device::{
        negotiate::{
            decide,
            Override, //
        },
        report,
        Common,
        Device, //
    },
    parameters::Parameters,
    policy::{
        self,
        Decision,
        Reason, //
    },
    region,
    sysfs,
    virtio::{
        self,
        bus::{
            self,
            Then, //
        },
        DeviceId,
        Locked, //
    },
    wire::Features, //
};
use kernel::{
    fmt,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// A device, until it leaves the bus.
struct Entry {
    id: DeviceId,
    device: Arc<Device>,
    ops: Override,
    /// Drop it without [`Registry::entries`] held: the drop waits for readers.
    _files: debugfs::DeviceFiles,
    /// The same is true of them.
    _attributes: Option<sysfs::DeviceAttributes>,
}

/// All devices that are relevant.
#[pin_data]
pub(crate) struct Registry {
    /// State that all devices share.
    pub(crate) common: Arc<Common>,
    root: debugfs::Root,
    attributes: sysfs::Root,
    unloading: Atomic<bool>,
    /// Devices that were added to the list since load.
    seen: Atomic<u64>,
    #[pin]
    entries: Mutex<KVec<Arc<Entry>>>,
}

impl Registry {
    /// An empty registry.
    pub(crate) fn new(
        module: &'static ThisModule,
        parameters: Parameters,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            common: Arc::pin_init(Common::new(module, parameters), GFP_KERNEL)?,
            root: debugfs::Root::new()?,
            attributes: sysfs::Root::new(),
            unloading: Atomic::new(false),
            seen: Atomic::new(0),
            entries <- new_mutex!(KVec::new()),
        })
    }

    /// Calls `f` for every device, in the order of the list.
    ///
    /// # Errors
    ///
    /// Those of `f`, which end the walk.
    pub(crate) fn for_each<E>(&self, mut f: impl FnMut(&Device) -> Result<(), E>) -> Result<(), E> {
        self.entries.lock().iter().try_for_each(|e| f(&e.device))
    }

    /// Counters of all devices since load, and how full their pools are.
    pub(crate) fn totals(&self) -> (Counters, Usage) {
        let mut usage = Usage::default();
        // With this lock held each binding is counted once.
        let entries = self.entries.lock();
        let mut counters = Counters::default();
        for entry in &*entries {
            let binding = entry.device.binding.lock();
            if let Some(bounce) = binding.bounce() {
                counters += bounce.counters();
                usage += bounce.usage();
            }
        }
        counters += self.common.retired();
        (counters, usage)
    }

    /// Logs the decisions that were made at load.
    pub(crate) fn report_load(&self) {
        let outcomes = &self.common.outcomes;
        pr_info!(
            "loaded: {} devices seen, {} bounced ({} on a hint), {} declined, {} refused\n",
            self.seen.load(Relaxed),
            outcomes.bounced.load(Relaxed) + outcomes.hint.load(Relaxed),
            outcomes.hint.load(Relaxed),
            outcomes.declined.load(Relaxed),
            outcomes.refused.load(Relaxed)
        );
        let unconfined = outcomes.unconfined.load(Relaxed);
        if unconfined != 0 {
            pr_err!("require=1, and {unconfined} devices are not confined: see above\n");
        }
    }

    fn find(&self, id: DeviceId) -> Option<Arc<Entry>> {
        let entries = self.entries.lock();
        entries.iter().find(|e| e.id == id).cloned()
    }

    /// Returns the entry of `dev`, a new one if there is none; `None` if the module is being
    /// unloaded.
    fn enter(&self, dev: &Locked) -> Result<Option<Arc<Entry>>> {
        if let Some(entry) = self.find(dev.id()) {
            return Ok(Some(entry));
        }
        #[cfg(CONFIG_KUNIT = "y")]
        if crate::tests::fake::is_without_memory() {
            return Err(ENOMEM);
        }
        let device = Arc::pin_init(Device::new(dev, self.common.clone())?, GFP_KERNEL)?;
        let entry = Arc::new(
            Entry {
                id: dev.id(),
                ops: Override::new(dev, device.clone()),
                _files: debugfs::DeviceFiles::new(&self.root, device.clone())?,
                _attributes: sysfs::DeviceAttributes::new(&self.attributes, device.clone()),
                device,
            },
            GFP_KERNEL,
        )?;
        let mut entries = self.entries.lock();
        // `stop()` sets the flag with this lock held. The unload then visits all listed devices,
        // and waits for the lock of each.
        if self.unloading.load(Relaxed) {
            return Ok(None);
        }
        entries.push(entry.clone(), GFP_KERNEL)?;
        self.seen.fetch_add(1, Relaxed);
        Ok(Some(entry))
    }

    /// Handles a device that was on the bus before the module was loaded.
    pub(crate) fn late(&self, dev: &Locked) -> Then {
        // The notifier has handled the device already.
        if self.knows(dev) {
            return Then::Nothing;
        }
        let offered = Features(dev.offered_features());
        let parameters = self.common.parameters(dev);
        let offers_dmb = policy::offers_dmb(offered, parameters.dmb);
        let found = region::find(dev, offers_dmb, &parameters);
        let required = parameters.requires(dev.device_type());
        let relevant = policy::is_relevant(offered, parameters.dmb, found);
        if !relevant && (!required || dev.driver_name().is_none()) {
            return Then::Nothing;
        }
        // The status of the device still has the refusal of an earlier driver.
        if dev.start_over() {
            return Then::Bind;
        }
        // A bound driver keeps working, unless `takeover` is set and the device can be bounced.
        let reason = match decide(dev, offered, found, &parameters) {
            Decision::Accept(_) | Decision::Hint(_) => {
                (!parameters.takeover).then_some(Reason::NotTakenOver)
            }
            decision => decision.reason(),
        };
        match reason {
            None => Then::Rebind,
            Some(reason) => {
                if required {
                    report::unconfined(dev, reason);
                    self.common.outcomes.unconfined.fetch_add(1, Relaxed);
                } else {
                    report::decision(dev, &Decision::Ignore(reason));
                }
                self.leave_alone(dev, offered, Decision::Ignore(reason));
                Then::Nothing
            }
        }
    }

    /// Lists a device whose driver was bound before the module was loaded.
    fn leave_alone(&self, dev: &Locked, offered: Features, decision: Decision) {
        match self.enter(dev) {
            Ok(Some(entry)) => entry.device.leave_alone(dev, offered, decision),
            Ok(None) => {}
            Err(_) => report::not_listed(dev),
        }
    }

    /// Whether `dev` is listed, and may have an override.
    pub(crate) fn knows(&self, dev: &virtio::Device) -> bool {
        self.find(dev.id()).is_some()
    }

    /// Whether the unload has to visit `dev`: it is listed, or it is barred without an entry.
    pub(crate) fn is_concerned(&self, dev: &virtio::Device) -> bool {
        self.common.parameters(dev).require || self.knows(dev)
    }

    /// Removes the override of a device, as the module is being unloaded.
    pub(crate) fn release(&self, dev: &Locked) -> Then {
        if let Some(entry) = self.find(dev.id()) {
            entry.ops.remove(dev);
        }
        dev.unbar();
        Then::Nothing
    }

    /// Stops hooking: unknown devices now, known ones once their lock has been taken after this
    /// call.
    pub(crate) fn stop(&self) {
        let _entries = self.entries.lock();
        self.unloading.store(true, Relaxed);
    }
}

impl bus::Events for Registry {
    fn binding(&self, dev: &Locked) {
        if self.unloading.load(Relaxed) {
            return;
        }
        let offered = Features(dev.offered_features());
        let parameters = self.common.parameters(dev);
        let required = parameters.requires(dev.device_type());
        // The registers of VIRTIO_F_DMB need not be read: a device that offers the bit is relevant.
        let found = region::find(dev, false, &parameters);
        if !required && !policy::is_relevant(offered, parameters.dmb, found) {
            // The device was relevant for an earlier driver only.
            if let Some(entry) = self.find(dev.id()) {
                let decision = Decision::Ignore(Reason::NotConcerned);
                entry.device.leave_alone(dev, offered, decision);
                // With CONFIG_DEBUG_TEST_DRIVER_REMOVE the core does not report the unbind of the
                // last driver.
                entry.ops.remove(dev);
            }
            return;
        }
        let entry = match self.enter(dev) {
            Ok(Some(entry)) => entry,
            Ok(None) => return,
            Err(_) => {
                report::no_memory(dev, required);
                if required {
                    dev.bar();
                    self.common.outcomes.refused.fetch_add(1, Relaxed);
                }
                return;
            }
        };
        entry.device.begin(dev, offered);
        // SAFETY: The override is the device's own, on the heap, and kept until the device has left
        // the bus, or the module has taken it away and waited.
        unsafe { entry.ops.install(dev) };
    }

    fn unbound(&self, dev: &Locked) {
        dev.unbar();
        if let Some(entry) = self.find(dev.id()) {
            entry.ops.remove(dev);
        }
    }

    fn removed(&self, dev: &virtio::Device) {
        let gone = {
            let mut entries = self.entries.lock();
            let at = entries.iter().position(|e| e.id == dev.id());
            at.and_then(|at| entries.remove(at).ok())
        };
        // Dropping the files waits for readers, which may wait for the lock.
        drop(gone);
    }
}

/// The files about all devices.
pub(crate) struct Files {
    _devices: File<Registry>,
    _pools: File<Registry>,
    _totals: File<Registry>,
}

impl Files {
    /// Makes `devices`, `pools` and `totals`.
    pub(crate) fn new(registry: &Arc<Registry>) -> Self {
        let dir = registry.root.dir();
        Self {
            _devices: File::text::<Devices>(dir, registry.clone()),
            _pools: File::text::<Pools>(dir, registry.clone()),
            _totals: File::text::<Totals>(dir, registry.clone()),
        }
    }
}

enum Devices {}

impl Text for Devices {
    type Of = Registry;

    const NAME: &'static CStr = c"devices";

    fn show(registry: &Registry, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        registry.for_each(|device| debugfs::write_line(f, device))
    }
}

enum Pools {}

impl Text for Pools {
    type Of = Registry;

    const NAME: &'static CStr = c"pools";

    fn show(registry: &Registry, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        registry.common.shared_pools.show(f)
    }
}

enum Totals {}

impl Text for Totals {
    type Of = Registry;

    const NAME: &'static CStr = c"totals";

    fn show(registry: &Registry, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (counters, usage) = registry.totals();
        debugfs::write_counters(f, &counters, &usage)?;
        let outcomes = &registry.common.outcomes;
        writeln!(f, "seen {}", registry.seen.load(Relaxed))?;
        writeln!(f, "bounced {}", outcomes.bounced.load(Relaxed))?;
        writeln!(f, "hint {}", outcomes.hint.load(Relaxed))?;
        writeln!(f, "declined {}", outcomes.declined.load(Relaxed))?;
        writeln!(f, "refused {}", outcomes.refused.load(Relaxed))?;
        writeln!(f, "unconfined {}", outcomes.unconfined.load(Relaxed))
    }
}
