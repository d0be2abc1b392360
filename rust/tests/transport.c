// SPDX-License-Identifier: GPL-2.0

#include <kunit/resource.h>
#include <kunit/static_stub.h>
#include <kunit/test-bug.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <linux/virtio_scsi.h>
#include <linux/vmalloc.h>

#include "../helpers.h"
#include "transport.h"

/*
 * While it is registered a device has the type UNKNOWN, so that no driver of
 * the kernel takes it; then it gets its own, and the driver below on request.
 * Devices of type FAKE are the driver's in the ordinary way too.
 */
#define TYPE_UNKNOWN	0xffffff00
#define TYPE_FAKE	0xf0
#define VENDOR_KUNIT	0x54494e55

#define QUEUE_SIZE	16
/* More than the smallest region has room for, of pages of any size. */
#define FIXED_QUEUE_SIZE	(PAGE_SIZE / 4)

static struct virtio_swiotlb_fake *to_fake(struct virtio_device *vdev)
{
	return container_of(vdev, struct virtio_swiotlb_fake, vdev);
}

struct virtio_swiotlb_fake_sight
virtio_swiotlb_fake_sight(struct virtio_swiotlb_fake *fake)
{
	return (struct virtio_swiotlb_fake_sight) {
		.config = fake->vdev.config,
		.map = fake->vdev.map,
		.token = fake->vdev.vmap.dma_dev,
		.features = fake->vdev.features,
	};
}

/* The transport */

static void fake_get(struct virtio_device *vdev, unsigned int offset, void *buf,
		     unsigned int len)
{
	memcpy(buf, to_fake(vdev)->setup.config + offset, len);
}

static void fake_set(struct virtio_device *vdev, unsigned int offset,
		     const void *buf, unsigned int len)
{
	memcpy(to_fake(vdev)->setup.config + offset, buf, len);
}

static u8 fake_get_status(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	u8 late = fake->log.status_read ? 0 : fake->setup.status_late;

	fake->log.status_read = true;
	return (fake->log.status & ~late) | fake->setup.status_noise;
}

static u32 fake_generation(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	u32 generations = fake->log.generations++;

	if (!fake->setup.runs)
		return 0;
	return generations - generations / fake->setup.runs;
}

static void fake_set_status(struct virtio_device *vdev, u8 status)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);

	if (fake->setup.refuses)
		status &= ~VIRTIO_CONFIG_S_FEATURES_OK;
	fake->log.status = status;
	fake->log.status_read = false;
	if (status & VIRTIO_CONFIG_S_DRIVER_OK)
		fake->log.readied++;
}

static void fake_reset(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);

	fake->log.status = 0;
	fake->log.told = 0;
	fake->log.resets++;
	fake->log.features_at_reset = vdev->features;
}

static u64 fake_get_features(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);

	if (fake->log.asked++ && fake->setup.offered_then)
		return fake->setup.offered_then;
	return fake->setup.offered;
}

static void fake_get_extended_features(struct virtio_device *vdev, u64 *features)
{
	virtio_features_from_u64(features, fake_get_features(vdev));
	features[1] = to_fake(vdev)->setup.offered_beyond;
}

static int fake_finalize_features(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);

	vring_transport_features(vdev);
	vdev->features &= ~fake->setup.dropped;
	fake->log.at_finalize = virtio_swiotlb_fake_sight(fake);
	fake->log.told = vdev->features;
	fake->log.told_beyond = vdev->features_array[1];
	fake->log.finalized++;
	return fake->setup.finalize_error;
}

static bool fake_notify(struct virtqueue *vq)
{
	to_fake(vq->vdev)->log.queues[vq->index].kicks++;
	return true;
}

static void fake_del_vqs(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	int i;

	for (i = 0; i < ARRAY_SIZE(fake->log.queues); i++) {
		if (fake->log.queues[i].vq)
			vring_del_virtqueue(fake->log.queues[i].vq);
		memset(&fake->log.queues[i], 0, sizeof(fake->log.queues[i]));
	}
}

static int fake_find_vqs(struct virtio_device *vdev, unsigned int nvqs,
			 struct virtqueue *vqs[],
			 struct virtqueue_info vqs_info[],
			 struct irq_affinity *desc)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	bool fixed = fake->setup.fixed_queues;
	struct virtio_swiotlb_fake_queue *queue;
	struct virtqueue *vq;
	int i;

	for (i = 0; i < nvqs; i++) {
		vq = vring_create_virtqueue(i, fixed ? FIXED_QUEUE_SIZE : QUEUE_SIZE,
					    fixed ? PAGE_SIZE : SMP_CACHE_BYTES,
					    vdev, true, fixed, vqs_info[i].ctx,
					    fake_notify, vqs_info[i].callback,
					    vqs_info[i].name);
		if (!vq) {
			fake_del_vqs(vdev);
			return -ENOMEM;
		}
		vqs[i] = vq;
		queue = &fake->log.queues[i];
		queue->vq = vq;
		queue->desc = virtqueue_get_desc_addr(vq);
		queue->avail = virtqueue_get_avail_addr(vq);
		queue->used = virtqueue_get_used_addr(vq);
		queue->num = virtqueue_get_vring_size(vq);
	}
	return 0;
}

#define FAKE_CONFIG_OPS				\
	.get = fake_get,			\
	.set = fake_set,			\
	.generation = fake_generation,		\
	.get_status = fake_get_status,		\
	.set_status = fake_set_status,		\
	.reset = fake_reset,			\
	.find_vqs = fake_find_vqs,		\
	.del_vqs = fake_del_vqs,		\
	.finalize_features = fake_finalize_features

/* As virtio-mmio and the legacy interface of virtio-pci. */
static const struct virtio_config_ops fake_ops = {
	FAKE_CONFIG_OPS,
	.get_features = fake_get_features,
};

/* As the modern interface of virtio-pci. */
static const struct virtio_config_ops fake_extended_ops = {
	FAKE_CONFIG_OPS,
	.get_extended_features = fake_get_extended_features,
};

/* The driver */

static int fake_start(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	struct virtqueue_info infos[VIRTIO_SWIOTLB_FAKE_QUEUES] = {
		{ "first" }, { "second" },
	};
	struct virtqueue *vqs[VIRTIO_SWIOTLB_FAKE_QUEUES];
	int err;

	err = virtio_find_vqs(vdev, fake->setup.wanted_queues, vqs, infos, NULL);
	if (err)
		return err;
	virtio_device_ready(vdev);
	return 0;
}

static void fake_stop(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	int i;

	virtio_reset_device(vdev);
	for (i = 0; i < ARRAY_SIZE(fake->log.queues); i++) {
		if (!fake->log.queues[i].vq)
			continue;
		/* The core counts descriptors, and a device can make it miscount. */
		if (virtqueue_is_broken(fake->log.queues[i].vq) || fake->setup.forgets)
			continue;
		while (virtqueue_detach_unused_buf(fake->log.queues[i].vq))
			;
	}
	vdev->config->del_vqs(vdev);
}

static void fake_undo(void *vdev)
{
	fake_stop(vdev);
}

static void fake_gone(struct virtio_device *vdev)
{
	if (to_fake(vdev)->setup.managed)
		virtio_reset_device(vdev);
	else
		fake_stop(vdev);
}

static int fake_validate(struct virtio_device *vdev)
{
	vdev->features &= ~to_fake(vdev)->setup.unwanted;
	return 0;
}

static int fake_probe(struct virtio_device *vdev)
{
	struct virtio_swiotlb_fake *fake = to_fake(vdev);
	int err;

	fake->log.at_probe = virtio_swiotlb_fake_sight(fake);
	err = fake_start(vdev);
	if (!err && fake->setup.managed)
		err = devm_add_action_or_reset(&vdev->dev, fake_undo, vdev);
	if (!err && fake->setup.probe_error) {
		fake_gone(vdev);
		err = fake->setup.probe_error;
	}
	return err;
}

static int fake_quiesce(struct virtio_device *vdev)
{
	fake_stop(vdev);
	return 0;
}

static const struct virtio_device_id fake_ids[] = {
	{ TYPE_FAKE, VENDOR_KUNIT },
	{ 0 },
};

static const unsigned int fake_features[] = {
	VIRTIO_SWIOTLB_FAKE_FEATURE,
	/* Of network devices. */
	VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
	VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
	/* Of block devices. */
	VIRTIO_BLK_F_SEG_MAX,
	VIRTIO_BLK_F_BLK_SIZE,
	VIRTIO_BLK_F_MQ,
	VIRTIO_BLK_F_ZONED,
	/* Of SCSI hosts. */
	VIRTIO_SCSI_F_T10_PI,
};

static struct virtio_driver fake_driver = {
	.driver.name = "virtio_swiotlb_fake",
	.id_table = fake_ids,
	.feature_table = fake_features,
	.feature_table_size = ARRAY_SIZE(fake_features),
	.validate = fake_validate,
	.probe = fake_probe,
	.remove = fake_gone,
	.freeze = pm_sleep_ptr(fake_quiesce),
	.restore = pm_sleep_ptr(fake_start),
	.reset_prepare = fake_quiesce,
	.reset_done = fake_start,
};

/* A device's life. KUnit runs one case after the other: no locks. */

static unsigned int fakes;

static void fake_release(struct device *dev)
{
	struct virtio_swiotlb_fake *fake = to_fake(dev_to_virtio(dev));

	vfree(fake->memory);
	kfree(fake);
}

static void fake_remove(void *data)
{
	struct virtio_swiotlb_fake *fake = data;
	struct device *parent = fake->parent;

	unregister_virtio_device(&fake->vdev);
	root_device_unregister(parent);
	if (!--fakes)
		unregister_virtio_driver(&fake_driver);
}

/* Registers a device of @type with a BAR of @bytes; NULL if that fails. */
struct virtio_swiotlb_fake *virtio_swiotlb_fake_new(u32 type, size_t bytes,
						    bool extended)
{
	static unsigned int serial;
	struct virtio_swiotlb_fake *fake;
	char name[32];
	int err;

	fake = kzalloc_obj(*fake);
	if (!fake)
		return NULL;
	fake->memory = vzalloc(bytes);
	if (!fake->memory)
		goto err_free;
	snprintf(name, sizeof(name), "virtio_swiotlb_fake%u", serial++);
	fake->parent = root_device_register(name);
	if (IS_ERR(fake->parent))
		goto err_vfree;
	/* As virtio-pci and virtio-mmio do it. */
	dev_set_drvdata(fake->parent, &fake->vdev);
	/* What is not bounced may use the DMA API. */
	dma_coerce_mask_and_coherent(fake->parent, DMA_BIT_MASK(64));

	fake->bytes = bytes;
	fake->setup.wanted_queues = 1;
	fake->vdev.dev.parent = fake->parent;
	fake->vdev.dev.release = fake_release;
	fake->vdev.config = extended ? &fake_extended_ops : &fake_ops;
	fake->vdev.id.vendor = VENDOR_KUNIT;
	fake->vdev.id.device = TYPE_UNKNOWN;

	if (!fakes && register_virtio_driver(&fake_driver))
		goto err_parent;
	err = register_virtio_device(&fake->vdev);
	if (err) {
		struct device *parent = fake->parent;

		put_device(&fake->vdev.dev);
		root_device_unregister(parent);
		if (!fakes)
			unregister_virtio_driver(&fake_driver);
		return NULL;
	}
	fakes++;
	fake->vdev.id.device = type;
	if (kunit_add_action_or_reset(kunit_get_current_test(), fake_remove, fake))
		return NULL;
	return fake;

err_parent:
	root_device_unregister(fake->parent);
err_vfree:
	vfree(fake->memory);
err_free:
	kfree(fake);
	return NULL;
}

/* Removes a device before its test ends. */
void virtio_swiotlb_fake_free(struct virtio_swiotlb_fake *fake)
{
	kunit_release_action(kunit_get_current_test(), fake_remove, fake);
}

/* The fake that @vdev is; NULL if it is not one. */
struct virtio_swiotlb_fake *virtio_swiotlb_fake_of(struct virtio_device *vdev)
{
	return vdev->dev.release == fake_release ? to_fake(vdev) : NULL;
}

int virtio_swiotlb_fake_bind(struct virtio_swiotlb_fake *fake)
{
	return device_driver_attach(&fake_driver.driver, &fake->vdev.dev);
}

void virtio_swiotlb_fake_unbind(struct virtio_swiotlb_fake *fake)
{
	device_release_driver(&fake->vdev.dev);
}

bool virtio_swiotlb_fake_bound(struct virtio_swiotlb_fake *fake)
{
	return device_is_bound(&fake->vdev.dev);
}

/* Calls @config, as a task that has loaded the pointer earlier. */
u8 virtio_swiotlb_fake_status(struct virtio_swiotlb_fake *fake,
			      const struct virtio_config_ops *config)
{
	return config->get_status(&fake->vdev);
}

/* The same for what the device offers. */
u64 virtio_swiotlb_fake_features(struct virtio_swiotlb_fake *fake,
				 const struct virtio_config_ops *config)
{
	u64 features[VIRTIO_FEATURES_U64S];

	if (!config->get_extended_features)
		return config->get_features(&fake->vdev);
	config->get_extended_features(&fake->vdev, features);
	return features[0];
}

int virtio_swiotlb_fake_reset_prepare(struct virtio_swiotlb_fake *fake)
{
	return virtio_device_reset_prepare(&fake->vdev);
}

int virtio_swiotlb_fake_reset_done(struct virtio_swiotlb_fake *fake)
{
	return virtio_device_reset_done(&fake->vdev);
}

#ifdef CONFIG_PM_SLEEP
int virtio_swiotlb_fake_freeze(struct virtio_swiotlb_fake *fake)
{
	return virtio_device_freeze(&fake->vdev);
}

int virtio_swiotlb_fake_restore(struct virtio_swiotlb_fake *fake)
{
	return virtio_device_restore(&fake->vdev);
}
#endif

u32 virtio_swiotlb_fake_read_config(struct virtio_swiotlb_fake *fake, u32 at)
{
	__le32 value;

	fake->vdev.config->get(&fake->vdev, at, &value, sizeof(value));
	return le32_to_cpu(value);
}

/* In pieces of which the core wants to be sure that they belong together. */
u64 virtio_swiotlb_fake_read_long(struct virtio_swiotlb_fake *fake, u32 at)
{
	return virtio_cread64(&fake->vdev, at);
}

size_t virtio_swiotlb_fake_max_mapping(struct virtio_swiotlb_fake *fake)
{
	return virtio_max_dma_size(&fake->vdev);
}

/*
 * The driver sends @out for the device to read and @in for it to write; an
 * empty one is left out. @in, or else @out, comes back when the device is done.
 */
int virtio_swiotlb_fake_add(struct virtio_swiotlb_fake *fake, u32 queue,
			    void *out, u32 out_len, void *in, u32 in_len)
{
	struct virtqueue *vq = fake->log.queues[queue].vq;
	struct scatterlist sg_out, sg_in, *sgs[2];
	unsigned int outs = 0, ins = 0;
	int err;

	if (out_len) {
		sg_init_one(&sg_out, out, out_len);
		sgs[outs++] = &sg_out;
	}
	if (in_len) {
		sg_init_one(&sg_in, in, in_len);
		sgs[outs + ins++] = &sg_in;
	}
	err = virtqueue_add_sgs(vq, sgs, outs, ins, in_len ? in : out,
				GFP_KERNEL);
	if (!err)
		virtqueue_kick(vq);
	return err;
}

/* What the device is done with, and how much it wrote; NULL if nothing. */
void *virtio_swiotlb_fake_get(struct virtio_swiotlb_fake *fake, u32 queue,
			      u32 *len)
{
	return virtqueue_get_buf(fake->log.queues[queue].vq, len);
}

/* A queue is being reset, or no longer: its rings may be gone meanwhile. */
void virtio_swiotlb_fake_resetting(struct virtio_swiotlb_fake *fake, u32 queue,
				   bool resetting)
{
	fake->log.queues[queue].vq->reset = resetting;
}

/* The core gives back what it takes for a buffer that the device has read. */
void virtio_swiotlb_fake_unmap(struct virtio_swiotlb_fake *fake, u64 handle,
			       size_t len)
{
	const struct virtio_map_ops *map = fake->vdev.map;

	map->unmap_page(fake->vdev.vmap, handle, len, DMA_TO_DEVICE, 0);
}

u64 virtio_swiotlb_fake_phys(void *buffer)
{
	return virt_to_phys(buffer);
}

struct pool {
	void *pages;
	size_t bytes;
};

static void pool_free(void *data)
{
	struct pool *pool = data;

	free_pages_exact(pool->pages, pool->bytes);
}

/*
 * Pages of the linear map to be named as a shared pool, until the test ends. The
 * devices that use them have to be made after this, for they go before.
 */
u8 *virtio_swiotlb_fake_pool(size_t bytes)
{
	struct kunit *test = kunit_get_current_test();
	struct pool *pool = kunit_kzalloc(test, sizeof(*pool), GFP_KERNEL);

	if (!pool)
		return NULL;
	pool->bytes = bytes;
	pool->pages = alloc_pages_exact(bytes, GFP_KERNEL);
	if (!pool->pages ||
	    kunit_add_action_or_reset(test, pool_free, pool))
		return NULL;
	return pool->pages;
}

static struct virtio_swiotlb_fake_host host;
static int host_error;

static bool fake_memory_encrypted(void)
{
	return true;
}

static int fake_share(void *base, u64 bytes)
{
	host.shared++;
	return host_error;
}

static int fake_unshare(void *base, u64 bytes)
{
	host.unshared++;
	host.wiped = !memchr_inv(base, 0, bytes);
	return 0;
}

void virtio_swiotlb_fake_encrypt(int error)
{
	struct kunit *test = kunit_get_current_test();

	host = (struct virtio_swiotlb_fake_host){};
	host_error = error;
	kunit_activate_static_stub(test, virtio_swiotlb_memory_encrypted,
				   fake_memory_encrypted);
	kunit_activate_static_stub(test, virtio_swiotlb_share, fake_share);
	kunit_activate_static_stub(test, virtio_swiotlb_unshare, fake_unshare);
}

struct virtio_swiotlb_fake_host virtio_swiotlb_fake_host(void)
{
	return host;
}

void virtio_swiotlb_fake_interrupts(bool on)
{
	if (on)
		local_irq_enable();
	else
		local_irq_disable();
}

/* Nobody counts the users of what is built in, or cannot be unloaded. */
int virtio_swiotlb_fake_module_users(void)
{
#if defined(MODULE) && defined(CONFIG_MODULE_UNLOAD)
	return module_refcount(THIS_MODULE);
#else
	return 0;
#endif
}
