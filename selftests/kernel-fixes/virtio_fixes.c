// SPDX-License-Identifier: GPL-2.0
/*
 * Devices and drivers that meet the defects which patches/fixes corrects.
 *
 * Each file in debugfs/virtio_fixes is a reproducer: a read runs it and returns
 * what came of it, if the kernel lets it. The devices are of a transport in
 * this module, except for "admin-queue", which takes a virtio-pci device whose
 * driver was refused.
 */

#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/rtnetlink.h>
#include <linux/scatterlist.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>

/* No driver has it. */
#define TYPE_NONE	0xfffffff0

#define QUEUES		2
#define QUEUE_SIZE	8

/* How long attempts to fill a queue are counted, and when there are enough. */
#define REFILL_MS	1000
#define REFILL_MANY	2000

/* Objects of the heap that are filled before a table is allocated there. */
#define HEAP_OBJECTS	64
#define HEAP_BYTE	0xa5

struct fake {
	struct virtio_device vdev;
	struct virtqueue *vqs[QUEUES];
	u64 offered;
	u8 status;
	/* Each read of the generation has another value. */
	bool runs;
	u32 generation;
	/* No buffer can be mapped; and how often that was tried. */
	bool full;
	atomic_t refused;
	/* The last mapping. */
	void *mapped;
};

static struct fake *to_fake(struct virtio_device *vdev)
{
	return container_of(vdev, struct fake, vdev);
}

/* Mapping operations */

static dma_addr_t fake_map_page(union virtio_map map, struct page *page,
				unsigned long offset, size_t size,
				enum dma_data_direction dir,
				unsigned long attrs)
{
	struct fake *fake = dev_get_drvdata(map.dma_dev);

	if (fake->full) {
		atomic_inc(&fake->refused);
		return DMA_MAPPING_ERROR;
	}
	fake->mapped = page_address(page) + offset;
	return page_to_phys(page) + offset;
}

static void fake_unmap_page(union virtio_map map, dma_addr_t addr, size_t size,
			    enum dma_data_direction dir, unsigned long attrs)
{
}

static void fake_sync(union virtio_map map, dma_addr_t addr, size_t size,
		      enum dma_data_direction dir)
{
}

static void *fake_alloc(union virtio_map map, size_t size, dma_addr_t *addr,
			gfp_t gfp)
{
	void *memory = alloc_pages_exact(size, gfp | __GFP_ZERO);

	if (memory)
		*addr = virt_to_phys(memory);
	return memory;
}

static void fake_free(union virtio_map map, size_t size, void *memory,
		      dma_addr_t addr, unsigned long attrs)
{
	free_pages_exact(memory, size);
}

static bool fake_need_sync(union virtio_map map, dma_addr_t addr)
{
	return false;
}

static int fake_mapping_error(union virtio_map map, dma_addr_t addr)
{
	return addr == DMA_MAPPING_ERROR ? -ENOMEM : 0;
}

static size_t fake_max_mapping_size(union virtio_map map)
{
	return SIZE_MAX;
}

static const struct virtio_map_ops fake_map_ops = {
	.map_page = fake_map_page,
	.unmap_page = fake_unmap_page,
	.sync_single_for_cpu = fake_sync,
	.sync_single_for_device = fake_sync,
	.alloc = fake_alloc,
	.free = fake_free,
	.need_sync = fake_need_sync,
	.mapping_error = fake_mapping_error,
	.max_mapping_size = fake_max_mapping_size,
};

/* The transport */

static void fake_get(struct virtio_device *vdev, unsigned int offset, void *buf,
		     unsigned int len)
{
	memset(buf, 0, len);
}

static void fake_set(struct virtio_device *vdev, unsigned int offset,
		     const void *buf, unsigned int len)
{
}

static u32 fake_generation(struct virtio_device *vdev)
{
	struct fake *fake = to_fake(vdev);

	if (fake->runs)
		fake->generation++;
	return fake->generation;
}

static u8 fake_get_status(struct virtio_device *vdev)
{
	return to_fake(vdev)->status;
}

static void fake_set_status(struct virtio_device *vdev, u8 status)
{
	to_fake(vdev)->status = status;
}

static void fake_reset(struct virtio_device *vdev)
{
	to_fake(vdev)->status = 0;
}

static u64 fake_get_features(struct virtio_device *vdev)
{
	return to_fake(vdev)->offered;
}

static int fake_finalize_features(struct virtio_device *vdev)
{
	vring_transport_features(vdev);
	return 0;
}

static bool fake_notify(struct virtqueue *vq)
{
	return true;
}

static void fake_del_vqs(struct virtio_device *vdev)
{
	struct fake *fake = to_fake(vdev);
	int i;

	for (i = 0; i < QUEUES; i++) {
		if (fake->vqs[i])
			vring_del_virtqueue(fake->vqs[i]);
		fake->vqs[i] = NULL;
	}
}

static int fake_find_vqs(struct virtio_device *vdev, unsigned int nvqs,
			 struct virtqueue *vqs[],
			 struct virtqueue_info infos[],
			 struct irq_affinity *desc)
{
	struct fake *fake = to_fake(vdev);
	unsigned int i;

	if (nvqs > QUEUES)
		return -EINVAL;
	for (i = 0; i < nvqs; i++) {
		vqs[i] = vring_create_virtqueue(i, QUEUE_SIZE, SMP_CACHE_BYTES,
						vdev, true, false, infos[i].ctx,
						fake_notify, infos[i].callback,
						infos[i].name);
		if (!vqs[i]) {
			fake_del_vqs(vdev);
			return -ENOMEM;
		}
		fake->vqs[i] = vqs[i];
	}
	return 0;
}

static const struct virtio_config_ops fake_ops = {
	.get = fake_get,
	.set = fake_set,
	.generation = fake_generation,
	.get_status = fake_get_status,
	.set_status = fake_set_status,
	.reset = fake_reset,
	.find_vqs = fake_find_vqs,
	.del_vqs = fake_del_vqs,
	.get_features = fake_get_features,
	.finalize_features = fake_finalize_features,
};

static void fake_release(struct device *dev)
{
	kfree(to_fake(dev_to_virtio(dev)));
}

static struct fake *fake_new(u32 type, u64 features)
{
	static atomic_t count = ATOMIC_INIT(0);
	struct fake *fake = kzalloc_obj(*fake);
	struct device *parent;
	char name[32];

	if (!fake)
		return ERR_PTR(-ENOMEM);
	/* That of a reproducer which was killed stays. */
	snprintf(name, sizeof(name), "virtio_fixes.%d", atomic_inc_return(&count));
	parent = root_device_register(name);
	if (IS_ERR(parent)) {
		kfree(fake);
		return ERR_CAST(parent);
	}
	dev_set_drvdata(parent, fake);
	fake->offered = features | BIT_ULL(VIRTIO_F_VERSION_1);
	fake->vdev.id.device = type;
	fake->vdev.config = &fake_ops;
	fake->vdev.dev.parent = parent;
	fake->vdev.dev.release = fake_release;
	if (features & BIT_ULL(VIRTIO_F_ACCESS_PLATFORM)) {
		fake->vdev.map = &fake_map_ops;
		fake->vdev.vmap.dma_dev = parent;
	}
	return fake;
}

/* Binds the driver that the kernel has for it. */
static int fake_register(struct fake *fake)
{
	struct device *parent = fake->vdev.dev.parent;
	int err = register_virtio_device(&fake->vdev);

	if (err) {
		put_device(&fake->vdev.dev);
		root_device_unregister(parent);
	}
	return err;
}

static void fake_unregister(struct fake *fake)
{
	struct device *parent = fake->vdev.dev.parent;

	unregister_virtio_device(&fake->vdev);
	root_device_unregister(parent);
}

/* A device without a driver, and its one queue. */
static struct fake *fake_with_queue(u64 features)
{
	struct virtqueue_info info = { "queue" };
	struct virtqueue *vq;
	struct fake *fake;
	int err;

	fake = fake_new(TYPE_NONE, features);
	if (IS_ERR(fake))
		return fake;
	err = fake_register(fake);
	if (err)
		return ERR_PTR(err);
	fake->vdev.features = fake->offered;
	err = fake_find_vqs(&fake->vdev, 1, &vq, &info, NULL);
	if (err) {
		fake_unregister(fake);
		return ERR_PTR(err);
	}
	return fake;
}

static void fake_end(struct fake *fake)
{
	fake_del_vqs(&fake->vdev);
	fake_unregister(fake);
}

/* Adds a buffer of two pieces for the device to read. */
static int add_two(struct fake *fake, void *memory)
{
	struct scatterlist sg[2];

	sg_init_table(sg, 2);
	sg_set_buf(&sg[0], memory, 8);
	sg_set_buf(&sg[1], memory + 8, 8);
	return virtqueue_add_outbuf(fake->vqs[0], sg, 2, fake, GFP_KERNEL);
}

/* The reproducers */

/* The device uses a buffer, after it has said that others follow all descriptors. */
static int chain_linked(struct seq_file *file, void *memory)
{
	struct fake *fake = fake_with_queue(0);
	const struct vring *vring;
	struct virtqueue *vq;
	unsigned int len;
	void *buffer;
	int i;

	if (IS_ERR(fake))
		return PTR_ERR(fake);
	vq = fake->vqs[0];
	vring = virtqueue_get_vring(vq);
	if (add_two(fake, memory))
		return -EIO;
	for (i = 0; i < QUEUE_SIZE; i++)
		vring->desc[i].flags |= cpu_to_virtio16(&fake->vdev, VRING_DESC_F_NEXT);
	vring->used->ring[0].id = vring->avail->ring[0];
	vring->used->idx = cpu_to_virtio16(&fake->vdev, 1);
	buffer = virtqueue_get_buf(vq, &len);
	seq_printf(file, "buffer %d free %u\n", buffer == fake, vq->num_free);
	fake_end(fake);
	return 0;
}

/* The driver takes back a buffer of which the device has cut off the end. */
static int chain_cut(struct seq_file *file, void *memory)
{
	struct fake *fake = fake_with_queue(0);
	struct virtqueue *vq;
	void *buffer, *next;

	if (IS_ERR(fake))
		return PTR_ERR(fake);
	vq = fake->vqs[0];
	if (add_two(fake, memory))
		return -EIO;
	virtqueue_get_vring(vq)->desc[0].flags = 0;
	buffer = virtqueue_detach_unused_buf(vq);
	next = virtqueue_detach_unused_buf(vq);
	seq_printf(file, "buffer %d next %d free %u\n", buffer == fake, !!next, vq->num_free);
	fake_end(fake);
	return 0;
}

static int add_when_full(u64 features, void *memory)
{
	struct fake *fake = fake_with_queue(features | BIT_ULL(VIRTIO_F_ACCESS_PLATFORM));
	int err;

	if (IS_ERR(fake))
		return PTR_ERR(fake);
	fake->full = true;
	err = add_two(fake, memory);
	fake_end(fake);
	return err;
}

/* What the driver is told by rings of each layout. */
static int mapping_fails(struct seq_file *file, void *memory)
{
	const u64 packed = BIT_ULL(VIRTIO_F_RING_PACKED);

	seq_printf(file, "split %d packed %d in-order %d\n", add_when_full(0, memory),
		   add_when_full(packed, memory),
		   add_when_full(packed | BIT_ULL(VIRTIO_F_IN_ORDER), memory));
	return 0;
}

/* Leaves bytes where the next object of this length is allocated. */
static void fill_heap(size_t size)
{
	void *objects[HEAP_OBJECTS];
	int i;

	for (i = 0; i < HEAP_OBJECTS; i++) {
		objects[i] = kmalloc(size, GFP_KERNEL);
		if (objects[i])
			memset(objects[i], HEAP_BYTE, size);
	}
	for (i = 0; i < HEAP_OBJECTS; i++)
		kfree(objects[i]);
}

/* What the device reads in an indirect table where nobody has to write. */
static int indirect_id(struct seq_file *file, void *memory)
{
	struct vring_packed_desc *table;
	struct fake *fake;

	fake = fake_with_queue(BIT_ULL(VIRTIO_F_RING_PACKED) | BIT_ULL(VIRTIO_F_ACCESS_PLATFORM) |
			       BIT_ULL(VIRTIO_RING_F_INDIRECT_DESC));
	if (IS_ERR(fake))
		return PTR_ERR(fake);
	/* Two entries, and what the core keeps of each behind them: as long. */
	fill_heap(4 * sizeof(*table));
	if (add_two(fake, memory))
		return -EIO;
	table = fake->mapped;
	seq_printf(file, "length %u id %#x %#x\n", le32_to_cpu(table[0].len),
		   le16_to_cpu(table[0].id), le16_to_cpu(table[1].id));
	virtqueue_detach_unused_buf(fake->vqs[0]);
	fake_end(fake);
	return 0;
}

/* A disk whose configuration never stands still is bound by virtio_blk. */
static int generation_runs(struct seq_file *file, void *memory)
{
	struct fake *fake = fake_new(VIRTIO_ID_BLOCK, 0);
	int err;

	if (IS_ERR(fake))
		return PTR_ERR(fake);
	fake->runs = true;
	err = fake_register(fake);
	if (err)
		return err;
	seq_printf(file, "bound %d\n", !!fake->vdev.dev.driver);
	fake_unregister(fake);
	return 0;
}

static struct net_device *link_of(struct fake *fake)
{
	struct net_device *dev;

	for_each_netdev(&init_net, dev)
		if (dev->dev.parent == &fake->vdev.dev)
			return dev;
	return NULL;
}

/* A network device is up, and none of its receive buffers can be mapped. */
static int refill_fails(struct seq_file *file, void *memory)
{
	struct fake *fake = fake_new(VIRTIO_ID_NET, BIT_ULL(VIRTIO_F_ACCESS_PLATFORM));
	struct net_device *dev;
	ktime_t begin;
	int err;

	if (IS_ERR(fake))
		return PTR_ERR(fake);
	fake->full = true;
	err = fake_register(fake);
	if (err)
		return err;
	rtnl_lock();
	dev = link_of(fake);
	err = dev ? dev_open(dev, NULL) : -ENODEV;
	rtnl_unlock();
	begin = ktime_get();
	while (!err && ktime_ms_delta(ktime_get(), begin) < REFILL_MS &&
	       atomic_read(&fake->refused) < REFILL_MANY)
		msleep(20);
	seq_printf(file, "error %d attempts %d ms %lld\n", err, atomic_read(&fake->refused),
		   ktime_ms_delta(ktime_get(), begin));
	fake_unregister(fake);
	return 0;
}

/* What is left of the rings of virtio_net, which has no handler, after reset_prepare. */
static int reset_unhandled(struct seq_file *file, void *memory)
{
	struct fake *fake = fake_new(VIRTIO_ID_NET, 0);
	int err, ret;

	if (IS_ERR(fake))
		return PTR_ERR(fake);
	err = fake_register(fake);
	if (err)
		return err;
	ret = virtio_device_reset_prepare(&fake->vdev);
	seq_printf(file, "result %d broken %d %d\n", ret,
		   fake->vqs[0] && virtqueue_is_broken(fake->vqs[0]),
		   fake->vqs[1] && virtqueue_is_broken(fake->vqs[1]));
	fake_unregister(fake);
	return 0;
}

/* A driver that resets the device because it has found no queues. */

static int probes, probe_result;

static int refused_probe(struct virtio_device *vdev)
{
	struct virtqueue_info info = { "queue" };
	struct virtqueue *vq;

	probes++;
	probe_result = virtio_find_vqs(vdev, 1, &vq, &info, NULL);
	virtio_reset_device(vdev);
	if (!probe_result)
		vdev->config->del_vqs(vdev);
	return -ENODEV;
}

static void refused_remove(struct virtio_device *vdev)
{
}

static const struct virtio_device_id refused_ids[] = {
	{ VIRTIO_ID_RNG, VIRTIO_DEV_ANY_ID },
	{ 0 },
};

static struct virtio_driver refused_driver = {
	.driver.name = "virtio_fixes",
	.id_table = refused_ids,
	.probe = refused_probe,
	.remove = refused_remove,
};

static int admin_queue(struct seq_file *file, void *memory)
{
	int err = register_virtio_driver(&refused_driver);

	if (err)
		return err;
	unregister_virtio_driver(&refused_driver);
	seq_printf(file, "probes %d result %d\n", probes, probe_result);
	return 0;
}

/* The files */

static const struct reproducer {
	const char *name;
	int (*run)(struct seq_file *file, void *memory);
} reproducers[] = {
	{ "chain-linked", chain_linked },
	{ "chain-cut", chain_cut },
	{ "mapping-fails", mapping_fails },
	{ "indirect-id", indirect_id },
	{ "admin-queue", admin_queue },
	{ "reset-unhandled", reset_unhandled },
	{ "generation-runs", generation_runs },
	{ "refill-fails", refill_fails },
};

static int reproducer_show(struct seq_file *file, void *unused)
{
	const struct reproducer *reproducer = file->private;
	void *memory = kzalloc(64, GFP_KERNEL);
	int err;

	if (!memory)
		return -ENOMEM;
	err = reproducer->run(file, memory);
	kfree(memory);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(reproducer);

static struct dentry *directory;

static int __init fixes_init(void)
{
	int i;

	directory = debugfs_create_dir("virtio_fixes", NULL);
	for (i = 0; i < ARRAY_SIZE(reproducers); i++)
		debugfs_create_file(reproducers[i].name, 0400, directory,
				    (void *)&reproducers[i], &reproducer_fops);
	return 0;
}

static void __exit fixes_exit(void)
{
	debugfs_remove(directory);
}

module_init(fixes_init);
module_exit(fixes_exit);
MODULE_DESCRIPTION("Reproducers of defects in the kernel's virtio code");
MODULE_LICENSE("GPL");
