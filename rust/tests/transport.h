/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A virtio transport, and a driver for its devices, for KUnit only.
 *
 * A device of this transport is a structure: its registers are members that a
 * test sets and looks at. It is registered with the real virtio core, and goes
 * when its test ends, however that ends.
 */
#ifndef _VIRTIO_SWIOTLB_TRANSPORT_H
#define _VIRTIO_SWIOTLB_TRANSPORT_H

#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#define VIRTIO_SWIOTLB_FAKE_QUEUES	2
#define VIRTIO_SWIOTLB_FAKE_CONFIG	96
#define VIRTIO_SWIOTLB_FAKE_FEATURE	5	/* the driver's only own feature */

/* What the device was told of a queue. */
struct virtio_swiotlb_fake_queue {
	struct virtqueue *vq;
	u64 desc;
	u64 avail;
	u64 used;
	u32 num;
	u32 kicks;
};

/* What the core would use at some moment. */
struct virtio_swiotlb_fake_sight {
	const struct virtio_config_ops *config;
	const struct virtio_map_ops *map;
	const void *token;
	u64 features;
};

/* What device and driver do; a test may change it at any time. */
struct virtio_swiotlb_fake_setup {
	u64 offered;
	u64 offered_then;	/* when asked again, if not 0 */
	u64 offered_beyond;	/* from feature 64 on; extended transports only */
	u8 status_noise;	/* set in every status that is read */
	u8 status_late;		/* not in the first one that is read after each write */
	/* The generation of the configuration does, but in one of so many reads. */
	u32 runs;
	u64 dropped;		/* finalize_features() clears these ... */
	int finalize_error;	/* ... and then returns this */
	bool refuses;		/* the device does not keep FEATURES_OK */
	u8 config_space[256];
	u8 config[VIRTIO_SWIOTLB_FAKE_CONFIG];
	u16 queue_sizes[4];	/* that the device says, of the first queues */
	u64 start;		/* of the BAR, for the guest */
	u64 bus;		/* of the BAR, for the device */
	bool dmb;		/* has the registers of VIRTIO_F_DMB: */
	u16 dmb_shm_id;
	u16 dmb_memory_type;
	u8 *pool;		/* the shared pool that is named for it, or NULL */
	u64 pool_bytes;
	bool pool_outside;	/* of the linear map, as the module is told */

	/* As with virtio-mmio only the core can shorten queues. */
	bool fixed_queues;

	u32 wanted_queues;
	u64 unwanted;		/* the driver's validate() clears these */
	int probe_error;	/* returned at the end of probe() */
	bool managed;		/* the core frees the queues, not the driver */
	bool forgets;		/* the driver deletes queues with buffers posted */
};

/* What the device saw. */
struct virtio_swiotlb_fake_log {
	u8 status;
	bool status_read;	/* since it was written */
	u32 readied;		/* how often it was written with DRIVER_OK */
	u64 told;
	u64 told_beyond;
	u32 asked;		/* how often for its features */
	u32 finalized;
	u32 resets;
	u64 features_at_reset;
	u32 generations;	/* how often for that of its configuration */
	struct virtio_swiotlb_fake_queue queues[VIRTIO_SWIOTLB_FAKE_QUEUES];

	struct virtio_swiotlb_fake_sight at_finalize;
	struct virtio_swiotlb_fake_sight at_probe;
};

struct virtio_swiotlb_fake {
	struct virtio_device vdev;
	struct device *parent;
	u8 *memory;		/* of the BAR */
	size_t bytes;
	struct virtio_swiotlb_fake_setup setup;
	struct virtio_swiotlb_fake_log log;
};

/* extended: the transport has get_extended_features(), else get_features(). */
struct virtio_swiotlb_fake *virtio_swiotlb_fake_new(u32 type, size_t bytes,
						    bool extended);
void virtio_swiotlb_fake_free(struct virtio_swiotlb_fake *fake);
struct virtio_swiotlb_fake *virtio_swiotlb_fake_of(struct virtio_device *vdev);
struct virtio_swiotlb_fake_sight
virtio_swiotlb_fake_sight(struct virtio_swiotlb_fake *fake);

int virtio_swiotlb_fake_bind(struct virtio_swiotlb_fake *fake);
void virtio_swiotlb_fake_unbind(struct virtio_swiotlb_fake *fake);
bool virtio_swiotlb_fake_bound(struct virtio_swiotlb_fake *fake);
u8 virtio_swiotlb_fake_status(struct virtio_swiotlb_fake *fake,
			      const struct virtio_config_ops *config);
u64 virtio_swiotlb_fake_features(struct virtio_swiotlb_fake *fake,
				 const struct virtio_config_ops *config);
int virtio_swiotlb_fake_reset_prepare(struct virtio_swiotlb_fake *fake);
int virtio_swiotlb_fake_reset_done(struct virtio_swiotlb_fake *fake);
int virtio_swiotlb_fake_freeze(struct virtio_swiotlb_fake *fake);
int virtio_swiotlb_fake_restore(struct virtio_swiotlb_fake *fake);

u32 virtio_swiotlb_fake_read_config(struct virtio_swiotlb_fake *fake, u32 at);
u64 virtio_swiotlb_fake_read_long(struct virtio_swiotlb_fake *fake, u32 at);
size_t virtio_swiotlb_fake_max_mapping(struct virtio_swiotlb_fake *fake);
int virtio_swiotlb_fake_add(struct virtio_swiotlb_fake *fake, u32 queue,
			    void *out, u32 out_len, void *in, u32 in_len);
void *virtio_swiotlb_fake_get(struct virtio_swiotlb_fake *fake, u32 queue,
			      u32 *len);

void virtio_swiotlb_fake_resetting(struct virtio_swiotlb_fake *fake, u32 queue,
				   bool resetting);
void virtio_swiotlb_fake_unmap(struct virtio_swiotlb_fake *fake, u64 handle,
			       size_t len);

u64 virtio_swiotlb_fake_phys(void *buffer);
u8 *virtio_swiotlb_fake_pool(size_t bytes);

/* What a host sees of a guest whose memory is encrypted. */
struct virtio_swiotlb_fake_host {
	u32 shared;		/* how often it was given access */
	u32 unshared;		/* ... and how often that was taken away */
	bool wiped;		/* all that it had last was 0 by then */
};

/* From here to the end of the test; sharing returns error. */
void virtio_swiotlb_fake_encrypt(int error);
struct virtio_swiotlb_fake_host virtio_swiotlb_fake_host(void);
void virtio_swiotlb_fake_interrupts(bool on);
int virtio_swiotlb_fake_module_users(void);

#endif /* _VIRTIO_SWIOTLB_TRANSPORT_H */
