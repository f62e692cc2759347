{{- /* Argument: root, component, present: its pods. Pods of a custom resource without a scale subresource take nothing
       but a whole minAvailable. None is made where all pods may go. */}}
{{- define "shoal.disruption" -}}
{{- $least := sub .present (int .root.Values.podDisruptionBudget.maxUnavailable) }}
{{- if and .root.Values.podDisruptionBudget.enabled (gt $least 0) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "shoal.name" .root }}-{{ .component }}
  labels: {{- include "shoal.labels" . | nindent 4 }}
spec:
  minAvailable: {{ $least }}
  selector:
    matchLabels: {{- include "shoal.podLabels" . | nindent 6 }}
{{- end }}
{{- end -}}
