/*
 * Preloaded into a destination QEMU 7.2, it makes it behave as QEMU before 5.2: requests lost with the channel are not
 * made again (migration/savevm.c, migrate_send_rp_req_pages_pending, is the only user of g_tree_foreach there with KVM).
 */
void g_tree_foreach(void *tree, void *func, void *data)
{
    (void)tree;
    (void)func;
    (void)data;
}
