//! The behaviour cases with the agent itself, its BPF programs and real sockets in the lab.
//!
//! Every case gets a lab of its own. The objects of a step are one manifest file that replaces the one before, and the
//! checks begin when the agent has programmed it. Endpoints are real servers, and everybody else whose address a
//! client asks for serves there, too: see the module `live::world`.
//!
//! The host and pods of the node under test meet the socket edge, which leaves to the packet edge what it cannot tell a
//! pod; the pod Q of another node and everybody outside meet the packet edge at the node's devices. Every check of a pod runs a second time, in a test whose name ends in
//! `_packets`: there the pods are in no cgroup of the node, so that their packets meet the packet edge. UDP is tried with
//! connected and with unconnected sockets.
//!
//! - Endpoints: the one that answers tells its name and its own address; getpeername and the source of datagrams are
//!   what the client asked for.
//! - `keep` and `masq`: the server sees whom [`cases::masquerade::seen`] says.
//! - REJECT: ECONNREFUSED. At a socket, from the call that names the destination. A server listens at the destination, so
//!   it is not the kernel that refuses.
//! - DROP: silence; at a socket of the host EHOSTUNREACH (EPERM before 5.18).
//! - PASS: the real owner of the destination answers.
//!
//! Pauses and affinity timeouts are a fifth of the table's.

use anyhow::{Context as _, Result};
use proxy_tests::cases::{self, Case, DetectLocal, Pods, falsified};
use proxy_tests::lab::LabSpec;
use proxy_tests::lab::network::PodLinks;

use crate::live;

/// Cases without a test here, and why.
const LEFT_OUT: [(&str, &str); 1] = [("P178", "SCTP")];

/// Defines one test per name, and the list of the names.
macro_rules! tests {
    ($list:ident $pods:ident: $($name:ident)*) => {
        const $list: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() -> Result<()> {
                run(stringify!($name), Pods::$pods)
            }
        )*
    };
}

fn run(name: &str, pods: Pods) -> Result<()> {
    let name = name.trim_end_matches("_packets");
    let case = cases::all().into_iter().find(|case| case.test_name() == name);
    run_case(case.context("no case of the table has this name")?, pods)
}

fn run_case(case: Case, pods: Pods) -> Result<()> {
    let mut spec = LabSpec::cases()?;
    if let DetectLocal::Bridge(_) = case.config.detect_local {
        spec.network.pods = PodLinks::Bridged;
    }
    live::check(case, spec, pods, |_| Ok(()))
}

#[test]
fn every_case_has_its_tests() {
    assert_eq!(SEEN, cases::lab_tests(Pods::Seen));
    assert_eq!(UNSEEN, cases::lab_tests(Pods::Unseen));
}

#[test]
fn cases_without_a_check_that_can_run_are_left_out() {
    let all = cases::all();
    let idle = all.iter().filter(|case| !case.is_live(Pods::Seen) && !case.is_live(Pods::Unseen));
    assert_eq!(idle.map(|case| case.id).collect::<Vec<_>>(), LEFT_OUT.map(|(id, _)| id));
}

/// Every check of a case made wrong, one at a time.
fn is_noticed(id: &str, pods: Pods) -> Result<()> {
    let all = cases::all();
    let case = all.iter().find(|case| case.id == id).context("no such case")?;
    for (wrong, check) in falsified(case).into_iter().filter(|(_, check)| check.is_live(pods)) {
        let check = format!("{check:?}");
        let message = run_case(wrong, pods).err().map(|error| format!("{error:#}"));
        assert!(message.as_ref().is_some_and(|text| text.contains(&check)), "{check}: {message:?}");
    }
    Ok(())
}

/// One check of each kind, by pods whose sockets are seen, by others, and from outside.
mod a_wrong_expectation_is_noticed {
    use super::*;

    macro_rules! in_case {
        ($($name:ident: $id:literal $pods:ident,)*) => {$(
            #[test]
            fn $name() -> Result<()> {
                is_noticed($id, Pods::$pods)
            }
        )*};
    }
    in_case! {
        p001: "P001" Seen,
        p043: "P043" Seen,
        p141: "P141" Seen,
        p143: "P143" Seen,
        p169: "P169" Seen,
        p080: "P080" Seen,
        p143_packets: "P143" Unseen,
        p170: "P170" Seen,
    }
}

tests! { SEEN Seen:
    p001_a_headless_service
    p002_no_clusterip_yet_but_a_nodeport
    p003_externalname_with_a_stale_clusterip_and_nodeport
    p004_a_service_for_another_proxy
    p005_handed_to_another_proxy_and_back
    p006_ipv6_only
    p007_both_families_ipv6_first
    p008_an_old_service_without_ipfamilies
    p009_two_ports_two_targets
    p010_one_number_three_protocols
    p011_nodeport_becomes_externalname
    p012_externalname_becomes_clusterip
    p013_spec_loadbalancerip_is_a_wish_not_an_address
    p014_a_load_balancer_that_has_only_a_host_name
    p015_leading_zeros_are_decimal
    p016_a_port_comes_and_goes
    p017_the_service_is_deleted_its_slice_remains
    p020_an_externalip_that_no_node_has
    p021_externalips_that_are_none_are_skipped
    p022_externalips_are_switched_off
    p023_a_load_balancer_address_with_ipmode_vip
    p024_a_load_balancer_address_with_ipmode_proxy_belongs_to_the_balancer
    p025_two_load_balancer_addresses
    p026_a_nodeport_on_the_primary_address
    p027_no_nodeport_on_a_secondary_address
    p028_nodeports_on_the_addresses_in_two_cidrs
    p029_nodeports_on_all_addresses_loopback_never
    p030_cidrs_of_one_family_leave_the_other_open
    p031_a_cidr_of_loopback_addresses_selects_nothing
    p032_a_load_balancer_without_nodeports
    p033_another_node_s_nodeport_is_that_node_s_business
    p034_a_nodeport_over_ipv6
    p035_one_nodeport_number_over_tcp_and_udp
    p036_a_nodeport_is_not_served_on_an_externalip
    p040_conditions_that_are_not_set_count_as_ready
    p041_an_endpoint_that_is_not_ready
    p042_two_slices_are_one_set
    p043_an_endpoint_in_two_slices_has_no_double_weight
    p044_one_address_three_times_in_a_slice
    p045_a_slice_port_without_a_name
    p046_a_slice_port_without_a_number
    p047_an_unnamed_port
    p048_port_names_that_differ
    p049_protocols_that_differ
    p050_one_port_name_two_numbers
    p051_one_endpoint_on_two_numbers
    p052_only_the_first_address_of_an_endpoint
    p053_an_endpoint_without_an_address
    p054_a_slice_of_host_names
    p055_a_slice_that_belongs_to_no_service
    p056_a_slice_becomes_headless
    p057_the_slice_comes_before_the_service
    p058_an_endpoint_moves_to_another_slice
    p059_a_slice_is_updated_in_place
    p060_one_of_two_slices_is_deleted
    p061_slices_of_other_services_and_namespaces
    p062_an_endpoint_without_a_node_is_nowhere_near
    p063_ready_and_terminating_at_once_as_published
    p070_ready_before_terminating
    p071_terminating_and_serving_when_none_is_ready
    p072_terminating_and_not_serving
    p073_serving_but_neither_ready_nor_terminating
    p074_internal_policy_local
    p075_internal_policy_local_without_a_local_endpoint
    p076_a_local_terminating_endpoint_before_a_remote_ready_one
    p077_the_only_local_endpoint_does_not_serve_any_more
    p078_no_endpoint_serves_anywhere
    p079_the_internal_policy_does_not_touch_external_frontends
    p080_external_policy_local_far_clients
    p081_external_policy_local_pods
    p082_external_policy_local_the_host
    p083_the_external_policy_does_not_touch_the_clusterip
    p084_external_policy_local_without_a_local_endpoint
    p085_the_same_on_the_nodeport
    p086_the_local_set_falls_back_by_itself
    p087_a_local_ready_endpoint_before_a_local_terminating_one
    p088_the_only_endpoint_is_remote_and_terminates
    p089_no_endpoint_serves
    p090_both_policies_local_the_endpoint_is_remote
    p091_an_external_policy_that_means_nothing
    p092_external_policy_local_with_externalips_alone
    p093_external_policy_cluster_falls_back_everywhere
    p094_a_terminating_endpoint_gives_way_to_a_ready_one
    p095_external_policy_local_without_detect_local
    p100_endpoints_for_our_zone
    p101_one_endpoint_without_a_hint_switches_hints_off
    p102_no_endpoint_for_our_zone
    p103_a_node_without_a_zone
    p104_a_node_with_an_empty_zone
    p105_the_only_endpoint_for_our_zone_is_not_ready
    p106_endpoints_for_several_zones
    p107_the_hint_for_our_node_comes_first
    p108_no_endpoint_for_our_node_but_for_our_zone
    p109_one_endpoint_without_a_hint_switches_both_modes_off
    p110_hints_narrow_the_cluster_set_only
    p111_the_local_set_ignores_hints
    p112_a_preference_without_hints
    p113_hints_without_a_preference
    p114_the_node_moves_to_other_zones
    p120_sources_through_a_clusterip
    p121_a_pod_reaches_itself
    p122_masquerading_everybody_changes_what_is_served_in_nothing
    p123_masquerading_everybody_concerns_clusterips_only
    p124_sources_through_a_clusterip_without_detect_local
    p125_sources_through_external_addresses_without_detect_local
    p126_the_internal_policy_has_no_say_in_sources
    p127_pods_are_what_comes_from_a_bridge
    p128_pods_are_what_comes_from_interfaces_with_a_prefix
    p129_a_pod_s_own_address_is_not_ours
    p130_replies_come_from_the_clusterip
    p140_no_endpoints_at_all
    p141_no_endpoints_udp
    p142_another_port_or_protocol_of_a_clusterip
    p143_an_address_for_services_that_no_service_has
    p144_the_same_where_no_servicecidr_is_known
    p145_a_clusterip_does_not_answer_ping
    p146_other_ports_of_external_addresses_are_not_ours
    p147_the_slice_is_deleted_and_made_again
    p148_a_port_that_no_slice_has
    p149_no_refusal_on_an_address_without_nodeports
    p150_one_client_in_range_one_not
    p151_the_ranges_are_about_the_load_balancer_address_alone
    p152_pods_and_the_host_need_to_be_in_range_too
    p153_the_host_is_in_range
    p154_white_space_around_a_range
    p155_everybody_is_in_range
    p156_some_pods_are_in_range
    p157_the_ranges_are_taken_away
    p158_ranges_hold_for_every_load_balancer_address
    p160_one_client_stays_with_one_endpoint
    p161_many_clients_are_spread_each_stays
    p162_a_client_is_forgotten_after_the_timeout
    p163_every_connection_begins_the_timeout_anew
    p164_the_remembered_endpoint_is_removed
    p165_affinity_off_and_on_again
    p166_affinity_through_a_nodeport
    p167_every_port_has_a_memory_of_its_own
    p168_affinity_of_datagrams
    p169_affinity_without_a_configuration
    p170_the_endpoint_of_a_udp_flow_is_removed
    p171_the_endpoint_of_a_udp_flow_gets_another_port
    p172_the_endpoint_of_a_udp_flow_terminates_and_still_serves
    p173_the_endpoint_of_a_udp_flow_is_not_ready_any_more
    p174_a_udp_flow_through_a_nodeport
    p175_a_udp_socket_is_older_than_the_first_endpoint
    p176_all_endpoints_of_udp_flows_are_removed
    p177_the_endpoint_of_a_tcp_connection_is_removed
    p179_a_flow_to_a_port_that_is_no_frontend
    p180_udp_flows_through_every_external_address
}

tests! { UNSEEN Unseen:
    p001_a_headless_service_packets
    p002_no_clusterip_yet_but_a_nodeport_packets
    p003_externalname_with_a_stale_clusterip_and_nodeport_packets
    p004_a_service_for_another_proxy_packets
    p005_handed_to_another_proxy_and_back_packets
    p006_ipv6_only_packets
    p007_both_families_ipv6_first_packets
    p008_an_old_service_without_ipfamilies_packets
    p009_two_ports_two_targets_packets
    p010_one_number_three_protocols_packets
    p011_nodeport_becomes_externalname_packets
    p012_externalname_becomes_clusterip_packets
    p013_spec_loadbalancerip_is_a_wish_not_an_address_packets
    p015_leading_zeros_are_decimal_packets
    p016_a_port_comes_and_goes_packets
    p017_the_service_is_deleted_its_slice_remains_packets
    p020_an_externalip_that_no_node_has_packets
    p021_externalips_that_are_none_are_skipped_packets
    p022_externalips_are_switched_off_packets
    p023_a_load_balancer_address_with_ipmode_vip_packets
    p024_a_load_balancer_address_with_ipmode_proxy_belongs_to_the_balancer_packets
    p025_two_load_balancer_addresses_packets
    p026_a_nodeport_on_the_primary_address_packets
    p027_no_nodeport_on_a_secondary_address_packets
    p028_nodeports_on_the_addresses_in_two_cidrs_packets
    p029_nodeports_on_all_addresses_loopback_never_packets
    p030_cidrs_of_one_family_leave_the_other_open_packets
    p031_a_cidr_of_loopback_addresses_selects_nothing_packets
    p032_a_load_balancer_without_nodeports_packets
    p033_another_node_s_nodeport_is_that_node_s_business_packets
    p034_a_nodeport_over_ipv6_packets
    p035_one_nodeport_number_over_tcp_and_udp_packets
    p036_a_nodeport_is_not_served_on_an_externalip_packets
    p040_conditions_that_are_not_set_count_as_ready_packets
    p041_an_endpoint_that_is_not_ready_packets
    p042_two_slices_are_one_set_packets
    p043_an_endpoint_in_two_slices_has_no_double_weight_packets
    p044_one_address_three_times_in_a_slice_packets
    p045_a_slice_port_without_a_name_packets
    p046_a_slice_port_without_a_number_packets
    p047_an_unnamed_port_packets
    p048_port_names_that_differ_packets
    p049_protocols_that_differ_packets
    p050_one_port_name_two_numbers_packets
    p051_one_endpoint_on_two_numbers_packets
    p052_only_the_first_address_of_an_endpoint_packets
    p053_an_endpoint_without_an_address_packets
    p054_a_slice_of_host_names_packets
    p055_a_slice_that_belongs_to_no_service_packets
    p056_a_slice_becomes_headless_packets
    p057_the_slice_comes_before_the_service_packets
    p058_an_endpoint_moves_to_another_slice_packets
    p059_a_slice_is_updated_in_place_packets
    p060_one_of_two_slices_is_deleted_packets
    p061_slices_of_other_services_and_namespaces_packets
    p062_an_endpoint_without_a_node_is_nowhere_near_packets
    p063_ready_and_terminating_at_once_as_published_packets
    p070_ready_before_terminating_packets
    p071_terminating_and_serving_when_none_is_ready_packets
    p072_terminating_and_not_serving_packets
    p073_serving_but_neither_ready_nor_terminating_packets
    p074_internal_policy_local_packets
    p075_internal_policy_local_without_a_local_endpoint_packets
    p076_a_local_terminating_endpoint_before_a_remote_ready_one_packets
    p077_the_only_local_endpoint_does_not_serve_any_more_packets
    p078_no_endpoint_serves_anywhere_packets
    p079_the_internal_policy_does_not_touch_external_frontends_packets
    p081_external_policy_local_pods_packets
    p083_the_external_policy_does_not_touch_the_clusterip_packets
    p084_external_policy_local_without_a_local_endpoint_packets
    p085_the_same_on_the_nodeport_packets
    p086_the_local_set_falls_back_by_itself_packets
    p087_a_local_ready_endpoint_before_a_local_terminating_one_packets
    p088_the_only_endpoint_is_remote_and_terminates_packets
    p089_no_endpoint_serves_packets
    p090_both_policies_local_the_endpoint_is_remote_packets
    p091_an_external_policy_that_means_nothing_packets
    p092_external_policy_local_with_externalips_alone_packets
    p093_external_policy_cluster_falls_back_everywhere_packets
    p094_a_terminating_endpoint_gives_way_to_a_ready_one_packets
    p095_external_policy_local_without_detect_local_packets
    p100_endpoints_for_our_zone_packets
    p101_one_endpoint_without_a_hint_switches_hints_off_packets
    p102_no_endpoint_for_our_zone_packets
    p103_a_node_without_a_zone_packets
    p104_a_node_with_an_empty_zone_packets
    p105_the_only_endpoint_for_our_zone_is_not_ready_packets
    p106_endpoints_for_several_zones_packets
    p107_the_hint_for_our_node_comes_first_packets
    p108_no_endpoint_for_our_node_but_for_our_zone_packets
    p109_one_endpoint_without_a_hint_switches_both_modes_off_packets
    p110_hints_narrow_the_cluster_set_only_packets
    p111_the_local_set_ignores_hints_packets
    p112_a_preference_without_hints_packets
    p113_hints_without_a_preference_packets
    p114_the_node_moves_to_other_zones_packets
    p120_sources_through_a_clusterip_packets
    p121_a_pod_reaches_itself_packets
    p122_masquerading_everybody_changes_what_is_served_in_nothing_packets
    p123_masquerading_everybody_concerns_clusterips_only_packets
    p124_sources_through_a_clusterip_without_detect_local_packets
    p125_sources_through_external_addresses_without_detect_local_packets
    p127_pods_are_what_comes_from_a_bridge_packets
    p128_pods_are_what_comes_from_interfaces_with_a_prefix_packets
    p129_a_pod_s_own_address_is_not_ours_packets
    p130_replies_come_from_the_clusterip_packets
    p140_no_endpoints_at_all_packets
    p141_no_endpoints_udp_packets
    p142_another_port_or_protocol_of_a_clusterip_packets
    p143_an_address_for_services_that_no_service_has_packets
    p144_the_same_where_no_servicecidr_is_known_packets
    p145_a_clusterip_does_not_answer_ping_packets
    p146_other_ports_of_external_addresses_are_not_ours_packets
    p147_the_slice_is_deleted_and_made_again_packets
    p148_a_port_that_no_slice_has_packets
    p149_no_refusal_on_an_address_without_nodeports_packets
    p151_the_ranges_are_about_the_load_balancer_address_alone_packets
    p152_pods_and_the_host_need_to_be_in_range_too_packets
    p153_the_host_is_in_range_packets
    p154_white_space_around_a_range_packets
    p155_everybody_is_in_range_packets
    p156_some_pods_are_in_range_packets
    p157_the_ranges_are_taken_away_packets
    p158_ranges_hold_for_every_load_balancer_address_packets
    p160_one_client_stays_with_one_endpoint_packets
    p161_many_clients_are_spread_each_stays_packets
    p162_a_client_is_forgotten_after_the_timeout_packets
    p163_every_connection_begins_the_timeout_anew_packets
    p164_the_remembered_endpoint_is_removed_packets
    p165_affinity_off_and_on_again_packets
    p166_affinity_through_a_nodeport_packets
    p167_every_port_has_a_memory_of_its_own_packets
    p168_affinity_of_datagrams_packets
    p169_affinity_without_a_configuration_packets
    p170_the_endpoint_of_a_udp_flow_is_removed_packets
    p171_the_endpoint_of_a_udp_flow_gets_another_port_packets
    p172_the_endpoint_of_a_udp_flow_terminates_and_still_serves_packets
    p173_the_endpoint_of_a_udp_flow_is_not_ready_any_more_packets
    p174_a_udp_flow_through_a_nodeport_packets
    p175_a_udp_socket_is_older_than_the_first_endpoint_packets
    p176_all_endpoints_of_udp_flows_are_removed_packets
    p177_the_endpoint_of_a_tcp_connection_is_removed_packets
    p180_udp_flows_through_every_external_address_packets
}
