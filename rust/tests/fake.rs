// SPDX-License-Identifier: GPL-2.0

//! A device for KUnit: the safe layer over `transport.c`, which has the transport and a driver.
//!
//! The region has three unrelated addresses: that of the bytes, that in guest physical memory, and
//! that on the bus. A mix-up fails the test.

use crate::{
    bindings,
    bounce::Bounce,
    device,
    parameters::Parameters,
    policy::{
        types::Types,
        Hint,
        Reason, //
    },
    region::{
        self,
        Source as _, //
    },
    registry::Registry,
    virtio::Device,
    wire::{
        capabilities::COMMON_DMB_BYTES,
        AddressForm,
        At,
        Bar,
        DmbRegisters,
        Extent,
        Features,
        Finding,
        NamedBy,
        BARS,
        CONFIG_SPACE_BYTES,
        MIN_REGION_PAGES, //
    }, //
};
use core::{
    ops::Range,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    types::Opaque, //
};

pub(crate) use bindings::{
    virtio_swiotlb_fake_host as Host,
    virtio_swiotlb_fake_log as Log,
    virtio_swiotlb_fake_setup as Setup,
    virtio_swiotlb_fake_sight as Sight, //
};

/// The only feature of the driver beside those of rings and transports.
pub(crate) const DRIVER_FEATURE: Features = Features(1 << bindings::VIRTIO_SWIOTLB_FAKE_FEATURE);
/// VIRTIO_F_DMB, as the parameter names it for fake devices.
pub(crate) const DMB: Features = Features(1 << 44);
/// The id of the shared memory that is the region in the dialect of VIRTIO_F_DMB.
pub(crate) const SHM_ID: u8 = 128;
/// VIRTIO_RING_F_INDIRECT_DESC (virtio 1.4, 6).
pub(crate) const INDIRECT: Features = Features(1 << 28);
/// VIRTIO_F_RING_PACKED (virtio 1.4, 6).
pub(crate) const PACKED: Features = Features(1 << 34);

/// A device type without another driver.
pub(crate) const TYPE: u32 = 0xf0;
/// The BAR of the region.
const BAR: u8 = 2;
/// The bytes of the BAR before the region, and behind it.
pub(crate) const MARGIN: usize = 2 * PAGE_SIZE;

/// The bytes of the smallest region.
pub(crate) const SMALLEST: usize = MIN_REGION_PAGES * PAGE_SIZE;
/// The first content of the margins and of the region.
pub(crate) const FILL: u8 = 0xa5;

/// The configuration of a device.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// The device type.
    pub(crate) kind: u32,
    /// The features that it offers.
    pub(crate) offered: Features,
    /// Length of the region in bytes.
    pub(crate) region_bytes: usize,
    /// Whether there is a SWIOTLB capability that names the region.
    pub(crate) capability: bool,
    /// Whether registers and a shared memory capability name the region.
    pub(crate) shared_memory: bool,
    /// Whether the transport asks for features the new way.
    pub(crate) extended: bool,
    /// How many queues the driver wants.
    pub(crate) queues: u32,
}

/// A modern device that offers the bit and brings a region.
pub(crate) const PLAN: Plan = Plan {
    kind: TYPE,
    offered: Features::VERSION_1.with(Features::SWIOTLB),
    region_bytes: 16 * SMALLEST,
    capability: true,
    shared_memory: false,
    extended: true,
    queues: 1,
};

/// A registered device. It is unregistered when this is dropped, or when its test fails.
pub(crate) struct Fake(NonNull<bindings::virtio_swiotlb_fake>);

impl Fake {
    /// Registers a device. No driver is bound to it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(plan: &Plan) -> Result<Self> {
        static SERIAL: Atomic<u64> = Atomic::new(1);

        let bytes = plan.region_bytes + 2 * MARGIN;
        // SAFETY: Called by a case of KUnit, whose end removes the device.
        let fake = unsafe { bindings::virtio_swiotlb_fake_new(plan.kind, bytes, plan.extended) };
        let fake = Self(NonNull::new(fake).ok_or(ENOMEM)?);
        let serial = SERIAL.fetch_add(1, Relaxed);
        fake.change(|setup| {
            setup.offered = plan.offered.0;
            setup.wanted_queues = plan.queues;
            setup.start = 0x40_0000_0000 + (serial << 32);
            setup.bus = 0xb000_0000_0000 + (serial << 33);
            let mut capabilities = Capabilities::new();
            if plan.capability {
                capabilities.add_swiotlb(MARGIN, plan.region_bytes);
            }
            if plan.shared_memory {
                capabilities.add_shared_memory(MARGIN, plan.region_bytes);
                capabilities.add_common();
                setup.dmb = true;
                setup.dmb_shm_id = SHM_ID.into();
                setup.dmb_memory_type = DmbRegisters::COHERENT;
            }
            setup.config_space = capabilities.space;
        });
        fake.fill(0, bytes, FILL);
        Ok(fake)
    }

    /// The module's view of the device.
    pub(crate) fn device(&self) -> &Device {
        // SAFETY: The device is registered as long as `self`; `Device` is transparent, and the
        // virtio device is the first member.
        unsafe { self.0.cast().as_ref() }
    }

    /// Changes the behaviour of device and driver.
    pub(crate) fn change(&self, f: impl FnOnce(&mut Setup)) {
        // SAFETY: Plain data of a live fake, read by this thread only.
        let setup = unsafe { &raw mut (*self.0.as_ptr()).setup };
        // SAFETY: As above.
        let mut changed = unsafe { setup.read() };
        f(&mut changed);
        // SAFETY: As above.
        unsafe { setup.write(changed) };
    }

    /// Names another region, from `offset` in the BAR.
    pub(crate) fn move_region(&self, offset: usize, bytes: usize) {
        let mut capabilities = Capabilities::new();
        capabilities.add_swiotlb(offset, bytes);
        self.change(|setup| setup.config_space = capabilities.space);
    }

    /// The device's record of events.
    pub(crate) fn log(&self) -> Log {
        // SAFETY: Plain data of a live fake, written by this thread only.
        unsafe { (&raw const (*self.0.as_ptr()).log).read() }
    }

    /// Guest physical address of the BAR.
    pub(crate) fn start(&self) -> u64 {
        // SAFETY: Plain data of a live fake, written by this thread only.
        unsafe { (*self.0.as_ptr()).setup.start }
    }

    /// The features that the device was told since its last reset.
    pub(crate) fn told(&self) -> Features {
        Features(self.log().told)
    }

    /// The operations that the core has now.
    pub(crate) fn sight(&self) -> Sight {
        // SAFETY: The fake is live, and nothing is being bound.
        unsafe { bindings::virtio_swiotlb_fake_sight(self.0.as_ptr()) }
    }

    /// Binds the driver.
    ///
    /// # Errors
    ///
    /// Those of the core, of the transport and of the driver.
    pub(crate) fn bind(&self) -> Result {
        // SAFETY: The fake is live.
        to_result(unsafe { bindings::virtio_swiotlb_fake_bind(self.0.as_ptr()) })
    }

    /// Unbinds the driver.
    pub(crate) fn unbind(&self) {
        // SAFETY: The fake is live.
        unsafe { bindings::virtio_swiotlb_fake_unbind(self.0.as_ptr()) };
    }

    /// Whether the driver is bound.
    pub(crate) fn is_bound(&self) -> bool {
        // SAFETY: The fake is live.
        unsafe { bindings::virtio_swiotlb_fake_bound(self.0.as_ptr()) }
    }

    /// Has the module handle the device as one that was on the bus before load.
    pub(crate) fn late(&self) {
        let then = {
            let device = self.device().lock();
            registry().late(&device)
        };
        then.carry_out(self.device());
    }

    /// Calls the operations of `then`, as a task that has loaded the pointer earlier. Returns
    /// status and features.
    pub(crate) fn ask(&self, then: &Sight) -> (u8, Features) {
        let fake = self.0.as_ptr();
        // SAFETY: The fake is live, and so are all operations that it has ever had.
        let status = unsafe { bindings::virtio_swiotlb_fake_status(fake, then.config) };
        // SAFETY: As above.
        let features = unsafe { bindings::virtio_swiotlb_fake_features(fake, then.config) };
        (status, Features(features))
    }

    /// A reset by the transport begins.
    pub(crate) fn reset_prepare(&self) -> Result {
        // SAFETY: The fake is live.
        to_result(unsafe { bindings::virtio_swiotlb_fake_reset_prepare(self.0.as_ptr()) })
    }

    /// A reset by the transport is over.
    pub(crate) fn reset_done(&self) -> Result {
        // SAFETY: The fake is live.
        to_result(unsafe { bindings::virtio_swiotlb_fake_reset_done(self.0.as_ptr()) })
    }

    /// Suspends the device.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn freeze(&self) -> Result {
        // SAFETY: The fake is live.
        to_result(unsafe { bindings::virtio_swiotlb_fake_freeze(self.0.as_ptr()) })
    }

    /// Resumes the device.
    #[cfg(CONFIG_PM_SLEEP)]
    pub(crate) fn restore(&self) -> Result {
        // SAFETY: The fake is live.
        to_result(unsafe { bindings::virtio_swiotlb_fake_restore(self.0.as_ptr()) })
    }

    /// The le32 at byte `at` of the device's configuration, as the driver reads it.
    pub(crate) fn read_config(&self, at: u32) -> u32 {
        // SAFETY: The fake is live, and the configuration is longer than the tests ask for.
        unsafe { bindings::virtio_swiotlb_fake_read_config(self.0.as_ptr(), at) }
    }

    /// The le64 at byte `at` of the device's configuration, as the driver reads it.
    pub(crate) fn read_long(&self, at: u32) -> u64 {
        // SAFETY: The fake is live, and the configuration is longer than the tests ask for.
        unsafe { bindings::virtio_swiotlb_fake_read_long(self.0.as_ptr(), at) }
    }

    /// The longest mapping that the driver is told, in bytes.
    pub(crate) fn max_mapping(&self) -> usize {
        // SAFETY: The fake is live.
        unsafe { bindings::virtio_swiotlb_fake_max_mapping(self.0.as_ptr()) }
    }

    /// The driver sends `out` and receives into `into`, in one request on queue `queue`. An empty
    /// one is left out. Both must stay until the request is back, or the driver is unbound.
    ///
    /// # Errors
    ///
    /// Those of `virtqueue_add_sgs()`.
    pub(crate) fn add(&self, queue: u32, out: &mut [u8], into: &mut [u8]) -> Result {
        // SAFETY: The driver is bound; the buffers are from kmalloc() and the caller keeps them.
        to_result(unsafe {
            bindings::virtio_swiotlb_fake_add(
                self.0.as_ptr(),
                queue,
                out.as_mut_ptr().cast(),
                out.len() as u32,
                into.as_mut_ptr().cast(),
                into.len() as u32,
            )
        })
    }

    /// Takes a completed request, if there is one. Returns the bytes that were written.
    pub(crate) fn get(&self, queue: u32) -> Option<u32> {
        let mut len = 0;
        // SAFETY: The driver is bound.
        let token = unsafe { bindings::virtio_swiotlb_fake_get(self.0.as_ptr(), queue, &mut len) };
        (!token.is_null()).then_some(len)
    }

    /// Begins or ends a reset of queue `queue`.
    pub(crate) fn set_resetting(&self, queue: u32, resetting: bool) {
        // SAFETY: The driver is bound, and uses the queue in this thread only.
        unsafe { bindings::virtio_swiotlb_fake_resetting(self.0.as_ptr(), queue, resetting) };
    }

    /// Has the core unmap `len` bytes at `handle`, which were never mapped.
    pub(crate) fn unmap_unknown(&self, handle: u64, len: usize) {
        // SAFETY: The device is bounced, and what is not mapped is not found.
        unsafe { bindings::virtio_swiotlb_fake_unmap(self.0.as_ptr(), handle, len) };
    }

    /// The bytes of the BAR.
    fn memory(&self) -> NonNull<[u8]> {
        // SAFETY: Fixed when the fake was made.
        let (memory, bytes) = unsafe { ((*self.0.as_ptr()).memory, (*self.0.as_ptr()).bytes) };
        // SAFETY: A fake has memory.
        NonNull::slice_from_raw_parts(unsafe { NonNull::new_unchecked(memory) }, bytes)
    }

    /// Fills part of the BAR.
    fn fill(&self, offset: usize, bytes: usize, with: u8) {
        self.with_bar(|bar| bar[offset..offset + bytes].fill(with));
    }

    /// Calls a function with the bytes of the BAR, as the device has them.
    pub(crate) fn with_bar<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        // SAFETY: Everything that uses these bytes runs in this thread, and `f` calls none of it.
        f(unsafe { self.memory().as_mut() })
    }

    /// Calls a function with the bytes of the region, where it was when the device was made.
    pub(crate) fn with_region<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        self.with_bar(|bar| {
            let end = bar.len() - MARGIN;
            f(&mut bar[MARGIN..end])
        })
    }

    /// Whether the BAR is unchanged outside the region.
    pub(crate) fn margins_are_clean(&self) -> bool {
        self.with_bar(|bar| {
            let end = bar.len() - MARGIN;
            bar[..MARGIN].iter().all(|b| *b == FILL) && bar[end..].iter().all(|b| *b == FILL)
        })
    }

    /// The bytes at an address that the device was told; `None` unless all of them lie in the
    /// region, or in the shared pool if one is named. This is all of the guest's memory that the
    /// device has.
    pub(crate) fn with_bytes<R>(
        &self,
        address: u64,
        len: usize,
        f: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        if let Some(pool) = Pool::of(self) {
            return pool.with_bytes(address, len, f);
        }
        let extent = self.extent(self.told().has(DMB))?;
        let At::Bar { bar, offset, .. } = extent.at else {
            return None;
        };
        let at = offset as usize;
        let first = match extent.form {
            AddressForm::Bus => Region::of(self.device())?.bus_address(bar, offset),
            AddressForm::Offset(offset) => offset,
        };
        let offset = usize::try_from(address.checked_sub(first)?).ok()?;
        let end = offset.checked_add(len)?;
        if end > extent.bytes as usize {
            return None;
        }
        self.with_bar(|bar| bar.get_mut(at + offset..at + end).map(f))
    }

    /// Where the device's region is now, if it has one that is usable, by its capability or by the
    /// registers of VIRTIO_F_DMB.
    fn extent(&self, by_registers: bool) -> Option<Extent> {
        let parameters = registry().common.parameters(self.device());
        let found = region::find(self.device(), by_registers, &parameters);
        let finding = match by_registers {
            true => found.dmb,
            false => found.swiotlb,
        };
        match finding {
            Finding::Usable(extent) => Some(extent),
            _ => None,
        }
    }

    /// A region of the device as it is now, mapped.
    ///
    /// # Errors
    ///
    /// `ENODEV` if it has none that is usable.
    pub(crate) fn map_region(&self) -> Result<region::Region> {
        let extent = self.extent(false).ok_or(ENODEV)?;
        let pools = &registry().common.shared_pools;
        region::Region::new(self.device(), &extent, pools).map_err(|_| ENODEV)
    }

    /// What the module knows of the device, if it has seen it.
    pub(crate) fn seen<R>(&self, f: impl FnOnce(&device::Device) -> R) -> Option<R> {
        let name = CString::try_from_fmt(fmt!("virtio{}", self.device().index())).ok()?;
        let mut f = Some(f);
        let mut found = None;
        let _ = registry().for_each(|seen| -> Result {
            if *seen.name == *name {
                found = f.take().map(|f| f(seen));
            }
            Ok(())
        });
        found
    }

    /// The device's bounce buffers, if it is bounced.
    pub(crate) fn bounce<R>(&self, f: impl FnOnce(&Bounce) -> R) -> Option<R> {
        self.seen(|seen| seen.binding.lock().bounce().map(f))
            .flatten()
    }

    /// What was decided last, as debugfs calls it: "unseen" if the module has nothing to do with
    /// the device.
    pub(crate) fn mode(&self) -> &'static str {
        self.seen(|seen| seen.binding.lock().mode())
            .unwrap_or("unseen")
    }

    /// Why the device is not bounced, if that is the decision.
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.seen(|seen| seen.binding.lock().reason())?
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // SAFETY: The fake is live, and this is the case of KUnit that made it.
        unsafe { bindings::virtio_swiotlb_fake_free(self.0.as_ptr()) };
    }
}

/// Configuration space with nothing in it but capabilities that name memory in the region's BAR.
struct Capabilities {
    space: [u8; CONFIG_SPACE_BYTES],
    /// Position of the pointer to the next capability.
    link: usize,
    /// Position of the next capability.
    free: usize,
}

impl Capabilities {
    fn new() -> Self {
        let mut space = [0; CONFIG_SPACE_BYTES];
        // PCI_STATUS_CAP_LIST; the list begins at PCI_CAPABILITY_LIST.
        space[0x06] = 0x10;
        Self {
            space,
            link: 0x34,
            free: 0x40,
        }
    }

    /// Adds a `struct virtio_pci_cap` of this type, `len` bytes long with what is behind it.
    fn add(&mut self, cfg_type: u8, id: u8, len: usize, offset: usize, bytes: usize) {
        let at = self.free;
        self.space[self.link] = at as u8;
        self.space[at] = 0x09;
        self.space[at + 2] = len as u8;
        self.space[at + 3] = cfg_type;
        self.space[at + 4] = BAR;
        self.space[at + 5] = id;
        self.space[at + 8..at + 12].copy_from_slice(&(offset as u32).to_le_bytes());
        self.space[at + 12..at + 16].copy_from_slice(&(bytes as u32).to_le_bytes());
        self.link = at + 1;
        self.free = at + len;
    }

    fn add_swiotlb(&mut self, offset: usize, bytes: usize) {
        self.add(10, 0, 16, offset, bytes);
    }

    /// The common configuration, before the region.
    fn add_common(&mut self) {
        self.add(1, 0, 16, 0, COMMON_DMB_BYTES);
    }

    /// `struct virtio_pci_cap64`, whose upper halves are 0.
    fn add_shared_memory(&mut self, offset: usize, bytes: usize) {
        self.add(8, SHM_ID, 24, offset, bytes);
    }
}

/// The region of a fake device, for `region.rs`.
#[repr(transparent)]
pub(crate) struct Region(Opaque<bindings::virtio_swiotlb_fake>);

// SAFETY: Used by the cases of KUnit only, which run in one thread.
unsafe impl Sync for Region {}

impl Region {
    /// The region of `dev`, if that is a fake. Valid as long as `dev`.
    pub(crate) fn of(dev: &Device) -> Option<&'static Self> {
        let vdev = ptr::from_ref(dev).cast_mut().cast();
        // SAFETY: `Device` is transparent, and valid; a fake goes after what is made of its
        // region.
        unsafe {
            bindings::virtio_swiotlb_fake_of(vdev)
                .cast::<Self>()
                .as_ref()
        }
    }

    /// The parameters for a fake device, in place of those that were `loaded`.
    pub(crate) fn parameters(&self, loaded: Parameters) -> Parameters {
        Parameters {
            hint: Hint::All,
            dmb: DMB,
            types: Types::of(&[TYPE as u8]),
            require: REQUIRES.load(Relaxed),
            ..loaded
        }
    }

    /// The shared pool that is named for the device.
    pub(crate) fn shared_pool(&self) -> Finding {
        let setup = self.setup();
        match setup.pool.is_null() {
            true => Finding::Absent,
            false => Finding::Usable(Extent {
                start: phys(setup.pool),
                bytes: setup.pool_bytes,
                at: At::SharedPool {
                    by: NamedBy::Devicetree,
                    in_linear_map: !setup.pool_outside,
                },
                form: AddressForm::Bus,
            }),
        }
    }

    /// Whether only the core can shorten queues.
    pub(crate) fn has_fixed_queues(&self) -> bool {
        self.setup().fixed_queues
    }

    /// The fewest entries of a queue among `queues`.
    pub(crate) fn shortest_queue(&self, queues: Range<u32>) -> Option<u16> {
        let sizes = self.setup().queue_sizes;
        queues
            .filter_map(|index| sizes.get(index as usize).copied())
            .filter(|entries| *entries != 0)
            .min()
    }

    fn setup(&self) -> Setup {
        // SAFETY: Plain data, written by this thread only.
        unsafe { (&raw const (*self.0.get()).setup).read() }
    }
}

impl region::Source for Region {
    fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES] {
        self.setup().config_space
    }

    fn bars(&self) -> [Bar; BARS] {
        let mut bars = [Bar::Absent; BARS];
        bars[usize::from(BAR)] = Bar::Memory {
            start: self.setup().start,
            // SAFETY: Fixed when the fake was made.
            bytes: unsafe { (*self.0.get()).bytes } as u64,
            prefetchable: true,
        };
        bars
    }

    fn dmb_registers(&self, _common: u64) -> Option<DmbRegisters> {
        let setup = self.setup();
        setup.dmb.then_some(DmbRegisters {
            shm_id: setup.dmb_shm_id,
            memory_type: setup.dmb_memory_type,
        })
    }

    fn bus_address(&self, _bar: u8, offset: u64) -> u64 {
        self.setup().bus + offset
    }

    fn memory(&self, _dev: &Device, extent: &Extent) -> Result<region::Memory, Reason> {
        let offset = (extent.start - self.setup().start) as usize;
        // SAFETY: A fake has memory, and an extent lies in its BAR.
        let base = unsafe { NonNull::new_unchecked((*self.0.get()).memory).add(offset) };
        Ok(region::Memory::mapped(base))
    }
}

/// The guest physical address of a byte in the linear map, as that of a buffer from kmalloc() is.
pub(crate) fn phys(byte: *mut u8) -> u64 {
    // SAFETY: Arithmetic only.
    unsafe { bindings::virtio_swiotlb_fake_phys(byte.cast()) }
}

/// Makes guest memory count as encrypted until the test ends. Sharing it returns `error`.
pub(crate) fn encrypt(error: i32) {
    // SAFETY: Called by a case of KUnit, whose end undoes it.
    unsafe { bindings::virtio_swiotlb_fake_encrypt(error) };
}

/// The host's record since then.
pub(crate) fn host() -> Host {
    // SAFETY: Plain data, written by this thread only.
    unsafe { bindings::virtio_swiotlb_fake_host() }
}

/// Memory that can be named as a shared pool, filled with [`FILL`]. It is freed with its test.
#[derive(Clone, Copy)]
pub(crate) struct Pool {
    first: NonNull<u8>,
    bytes: usize,
}

impl Pool {
    /// A pool of `bytes` bytes. Make its devices later.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        // SAFETY: Called by a case of KUnit, whose end frees the memory.
        let first = unsafe { bindings::virtio_swiotlb_fake_pool(bytes) };
        let first = NonNull::new(first).ok_or(ENOMEM)?;
        let pool = Self { first, bytes };
        pool.with(|bytes| bytes.fill(FILL));
        Ok(pool)
    }

    /// The pool that is named for a device.
    fn of(fake: &Fake) -> Option<Self> {
        let setup = Region::of(fake.device())?.setup();
        Some(Self {
            first: NonNull::new(setup.pool)?,
            bytes: setup.pool_bytes as usize,
        })
    }

    /// Names the first `bytes` bytes of the pool for a device, as firmware does.
    pub(crate) fn name_first(&self, bytes: usize, fake: &Fake) {
        fake.change(|setup| {
            setup.pool = self.first.as_ptr();
            setup.pool_bytes = bytes as u64;
        });
    }

    /// Names the pool for a device, as firmware does.
    pub(crate) fn name(&self, fake: &Fake) {
        self.name_first(self.bytes, fake);
    }

    /// Guest physical address of the pool.
    pub(crate) fn start(&self) -> u64 {
        phys(self.first.as_ptr())
    }

    /// Calls a function with the bytes of the pool, as its devices have them.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut bytes = NonNull::slice_from_raw_parts(self.first, self.bytes);
        // SAFETY: Everything that uses these bytes runs in this thread, and `f` calls none of it.
        f(unsafe { bytes.as_mut() })
    }

    /// The bytes at an address that a device was told; `None` unless all of them lie in the pool.
    fn with_bytes<R>(&self, address: u64, len: usize, f: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let offset = usize::try_from(address.checked_sub(self.start())?).ok()?;
        let end = offset.checked_add(len)?;
        self.with(|pool| pool.get_mut(offset..end).map(f))
    }
}

/// Calls `f` with interrupts off on this CPU. `f` must return.
#[cfg(not(CONFIG_PREEMPT_RT))]
pub(crate) fn without_interrupts<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: A case of KUnit is called with interrupts on, and they are on again below.
    unsafe { bindings::virtio_swiotlb_fake_interrupts(false) };
    let result = f();
    // SAFETY: As above.
    unsafe { bindings::virtio_swiotlb_fake_interrupts(true) };
    result
}

/// The number of users that a bounced device adds to [`module_users`].
pub(crate) const DEVICE_USERS: i32 = if cfg!(all(MODULE, CONFIG_MODULE_UNLOAD)) {
    1
} else {
    0
};

/// The number of users of this module.
pub(crate) fn module_users() -> i32 {
    // SAFETY: No requirements.
    unsafe { bindings::virtio_swiotlb_fake_module_users() }
}

static REQUIRES: Atomic<bool> = Atomic::new(false);
static WITHOUT_MEMORY: Atomic<bool> = Atomic::new(false);

/// Whether recording a device fails for lack of memory.
pub(crate) fn is_without_memory() -> bool {
    WITHOUT_MEMORY.load(Relaxed)
}

/// Calls `f` as if the module had been loaded with `require=1`. Nothing may be asserted in `f`.
pub(crate) fn with_require<R>(f: impl FnOnce() -> R) -> R {
    REQUIRES.store(true, Relaxed);
    let result = f();
    REQUIRES.store(false, Relaxed);
    result
}

/// Calls `f` while there is no memory to record a device. Nothing may be asserted in `f`.
pub(crate) fn without_memory<R>(f: impl FnOnce() -> R) -> R {
    WITHOUT_MEMORY.store(true, Relaxed);
    let result = f();
    WITHOUT_MEMORY.store(false, Relaxed);
    result
}

static REGISTRY: Atomic<*const Registry> = Atomic::new(ptr::null());

/// Sets the registry for the tests. The module keeps it while suites can run.
pub(crate) fn set_registry(registry: &Arc<Registry>) {
    REGISTRY.store(Arc::as_ptr(registry), Relaxed);
}

/// The registry of the module.
pub(crate) fn registry() -> &'static Registry {
    // SAFETY: Suites run while the module is live: between `set_registry()` in its init, and its
    // exit.
    unsafe { &*REGISTRY.load(Relaxed) }
}
